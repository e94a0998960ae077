"""What thoughts say: their text, and whether they hold the target."""

from collections.abc import Sequence
from typing import Any

from forethought.data.positions import ThoughtFormat
from forethought.rollout import Thoughts

Tokens = list[list[list[int]]]
"""Tokens of the thoughts of each position."""


def inside(thoughts: Thoughts, form: ThoughtFormat) -> Tokens:
    """What was thought, without a sampled closing delimiter."""
    size, groups = len(form.close), []
    columns = zip(thoughts.tokens.tolist(), thoughts.lengths.tolist(), thoughts.closed.tolist(), strict=True)
    for group in columns:
        members = zip(*group, strict=True)
        groups.append([tokens[: length - size * closed] for tokens, length, closed in members])
    return groups


def texts(tokenizer: Any, thoughts: Tokens) -> list[list[str]]:
    """The text of each thought."""
    flat = iter(tokenizer.batch_decode([tokens for group in thoughts for tokens in group]))
    return [[next(flat) for _ in group] for group in thoughts]


def leakage(tokenizer: Any, targets: Sequence[int], said: list[list[str]]) -> list[float | None]:
    """Share of each position's thoughts that contain the target's text, spaces around it left out.

    None where the target is white space, or no whole character, so that it has no text to look for.
    """
    shares: list[float | None] = []
    for target, group in zip(tokenizer.batch_decode([[token] for token in targets]), said, strict=True):
        wanted = target.strip()
        known = wanted and "\N{REPLACEMENT CHARACTER}" not in wanted
        shares.append(sum(wanted in text for text in group) / len(group) if known else None)
    return shares
