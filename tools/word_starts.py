"""Gains of thoughts at tokens after white space, and at those joined to the text before: `word_starts.py RUN ...`

Reads the documents of the thought viewer (documents.json), in which there are thoughts at every position. A token of
the first kind has the white space in its own text. Nats, of the model over itself, the mean over positions.
"""

import json
import sys
from pathlib import Path


def main(runs: list[str]) -> int:
    """Print a line for each run."""
    for run in runs:
        documents = json.loads((Path(run) / "documents.json").read_text(encoding="utf-8"))["documents"]
        gains: dict[bool, list[float]] = {True: [], False: []}
        for position in (position for document in documents for position in document["positions"]):
            thoughts = [thought["evidence"] for thought in position["thoughts"]]
            gains[position["target"][:1].isspace()].append(sum(thoughts) / len(thoughts) - position["nothink"])
        said = [f"{sum(some) / max(1, len(some)):+.2f} at {len(some)} positions" for some in gains.values()]
        print(f"{run}: after white space {said[0]}, joined to the text before {said[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
