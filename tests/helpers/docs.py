"""What the documentation names."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def backticked(path: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", (ROOT / path).read_text(encoding="utf-8").replace("\\|", "|")))
