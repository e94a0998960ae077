"""The thought viewer: measured documents, or logged thoughts without them, as data for the script of the page.

    RUN/documents.json   {"version": 1, "model": ..., "documents": [{"document", "domain", "tokens", "positions"}]}

Corpus text reaches the page as JSON in an element of its own, and no character of it can end that element.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from markupsafe import Markup
from pydantic import Field

from forethought.config import UserError
from forethought.html import limit, visible
from forethought.tools.report.runs import Number, Position, Thoughts, TopTokens, read_checked

FIGURES = ("length", "closed", "evidence", "reward", "advantage")
"""Of a thought, as the page shows them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPosition:
    """A measured token, `tokens[at]`, which is predicted from the tokens before it."""

    at: Annotated[int, Field(ge=0)]
    target: str
    nothink: Number = None  # log p of the target without a thought, in nats
    nothink_top: TopTokens = field(default_factory=list)
    thoughts: Thoughts = field(default_factory=list)

    @property
    def gain(self) -> float | None:
        """Mean log p of the target after a thought minus log p without one, in nats; None if not measured."""
        known = [one.evidence for one in self.thoughts if one.evidence is not None]
        return fmean(known) - self.nothink if known and self.nothink is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredDocument:
    """A tokenized text with its measured positions."""

    document: str
    domain: str | None = None
    tokens: list[str]
    positions: list[MeasuredPosition] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """The content of documents.json."""

    version: Literal[1]
    model: str
    documents: list[MeasuredDocument]


def load(path: Path) -> Documents | None:
    """Read RUN/documents.json; None if there is none. Raises a one-line UserError if it is broken."""
    file = path / "documents.json"
    if not file.is_file():
        return None
    found = read_checked(file, Documents)
    for one in found.documents:
        indices = [position.at for position in one.positions]
        if len(set(indices)) < len(indices) or max(indices, default=-1) >= len(one.tokens):
            raise UserError(
                f"{file}: document {visible(one.document)!r}: positions must have different tokens, from 0 to "
                f"{len(one.tokens) - 1}"
            )
    return found


def collect(runs: Iterable[tuple[str, Documents | None, list[Position]]]) -> dict[str, Any] | None:
    """All that runs measured or (where they measured nothing) logged, by the names of the runs; None if nothing.

    For the page's template: whether any run has documents.json, and JSON that is safe inside a script element.
    """
    shown, documents, measured = [], {}, False
    for name, found, positions in runs:
        versions = list(_logged(positions) if found is None else _measured(found))
        if not versions:
            continue
        measured = measured or found is not None
        index = str(len(shown))
        shown.append({"name": visible(name), "model": None if found is None else visible(found.model)})
        for title, domain, version in versions:
            row = documents.setdefault(_key(title, index, documents), {"title": title, "domain": domain})
            row.setdefault("versions", {})[index] = version
    if not shown:
        return None
    rows = list(documents.values())
    versions = [version for row in rows for version in row["versions"].values()]
    full = limit(position["gain"] for version in versions for position in version["positions"])
    return {"measured": measured, "data": _embedded({"runs": shown, "documents": rows, "limit": full})}


def script(name: str) -> dict[str, str]:
    """A script of this folder: its text, and as `source` its hash for the Content-Security-Policy."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": Markup(text), "source": f"'sha256-{digest}'"}


def _key(title: str, run: str, documents: dict[Any, Any]) -> tuple[str, int]:
    """A key for a document; a second document of a run with the same title is not a version of the first."""
    count = 0
    while run in documents.get((title, count), {}).get("versions", {}):
        count += 1
    return title, count


def _measured(found: Documents) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    for one in found.documents:
        positions = sorted(one.positions, key=lambda position: position.at)
        domain = None if one.domain is None else visible(one.domain)
        yield visible(one.document), domain, _version(one.tokens, positions, _spaced(one.tokens))


def _logged(positions: list[Position]) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Logged positions as documents of two tokens: the context and the target."""
    spaced = _spaced([one.target for one in positions])
    for one in positions:
        position = MeasuredPosition(at=1, target=one.target, nothink=one.nothink, thoughts=one.thoughts)
        title = visible(f"step {one.step:,}: {one.document}, position {one.position}")
        yield title, f"step {one.step:,}", _version([one.context, one.target], [position], spaced)


def _spaced(tokens: list[str]) -> bool:
    """Whether spaces must be put between the tokens: none of them has its own."""
    return all(token == token.strip() for token in tokens)


def _version(tokens: list[str], positions: list[MeasuredPosition], spaced: bool) -> dict[str, Any]:
    return {
        "spaced": spaced,
        "tokens": [_shown(token) for token in tokens],
        "positions": [
            {
                "at": one.at,
                "target": _shown(one.target),
                "gain": one.gain,
                "nothink": one.nothink,
                "top": _top(one.nothink_top),
                "thoughts": [
                    {"text": _shown(each.text), "top": _top(each.top)} | {name: getattr(each, name) for name in FIGURES}
                    for each in one.thoughts
                ],
            }
            for one in positions
        ],
    }


def _shown(text: str) -> str:
    return visible(text, kept="\n")


def _top(tokens: list[tuple[str, float]]) -> list[list[str | float]]:
    return [[_shown(text), min(probability, 1.0)] for text, probability in tokens]


def _embedded(value: Any) -> Markup:
    """JSON without the characters that could start or end an element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))
