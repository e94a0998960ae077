"""Embedded worlds: endless generated text, small enough for two cores, in which thinking pays.

A world is a module with `row(split, index, seed)`, `vocabulary()` and `truth(text, thought)`.
"""

from forethought.data.worlds import cups, notes

WORLDS = {"cups": cups, "notes": notes}
