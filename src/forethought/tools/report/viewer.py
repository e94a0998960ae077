"""The thought viewer: measured documents (or, without them, logged thoughts) as data for the page's one script.

    RUN/documents.json   {"version": 1, "model": ..., "documents": [{"document", "domain", "tokens", "positions"}]}

Corpus text reaches the page as JSON in an element of its own, in which no character can end that element.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from markupsafe import Markup
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from forethought.config import UserError
from forethought.tools.report.runs import Position, Run, number
from forethought.tools.report.text import visible

LIMITS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Gains in nats that may have the full colour: the first that nine tenths of all gains do not exceed."""

Figure = Annotated[float | None, BeforeValidator(number)]
"""A finite number, or None for whatever was not measured."""
Chance = Annotated[float, Field(ge=0, le=1.001)]  # exp of a rounded log-probability may exceed 1
Top = Annotated[list[tuple[str, Chance]], BeforeValidator(lambda value: [] if value is None else value)]
"""The likeliest tokens and their probabilities, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadThought:
    """A thought at a measured position. Log-probabilities, reward and advantage are in nats."""

    text: str
    length: Figure = None
    """Sampled tokens."""
    closed: bool = False
    evidence: Figure = None
    """log p of the target after the thought."""
    reward: Figure = None
    advantage: Figure = None
    top: Top = field(default_factory=list)
    """What the model expects after the thought."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPosition:
    """A measured token: `tokens[at]`, predicted from what stands before it."""

    at: Annotated[int, Field(ge=0)]
    target: str
    nothink: Figure = None
    """log p of the target without a thought, in nats."""
    nothink_top: Top = field(default_factory=list)
    thoughts: list[ReadThought] = field(default_factory=list)

    @property
    def gain(self) -> float | None:
        """Mean evidence of the thoughts minus log p without one, in nats; None where either was not measured."""
        known = [one.evidence for one in self.thoughts if one.evidence is not None]
        return fmean(known) - self.nothink if known and self.nothink is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadDocument:
    """A text as tokens, with the positions measured in it."""

    document: str
    domain: str | None = None
    tokens: list[str]
    positions: list[ReadPosition] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """What documents.json holds."""

    version: Literal[1]
    model: str
    documents: list[ReadDocument]


_READER = TypeAdapter(Documents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewer:
    """What the page needs besides the section's HTML."""

    measured: bool
    """Whether any run has documents.json."""
    data: Markup
    """JSON that a script element can hold."""
    script: Markup
    source: str
    """The script's hash, as a Content-Security-Policy names it."""


def load(path: Path) -> Documents | None:
    """RUN/documents.json, or None where there is none. Raises UserError, in one line, when it is broken."""
    file = path / "documents.json"
    if not file.is_file():
        return None
    try:
        found = _READER.validate_python(json.loads(file.read_bytes()))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        message = visible(f"{place}: {first['msg']}")
        raise UserError(f"{file}: {message}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not valid JSON: {error}") from None
    for one in found.documents:
        places = [position.at for position in one.positions]
        if len(set(places)) < len(places) or max(places, default=-1) >= len(one.tokens):
            raise UserError(
                f"{file}: document {visible(one.document)!r}: every position must stand at a token of its own, "
                f"0 to {len(one.tokens) - 1}"
            )
    return found


def collect(runs: list[Run]) -> Viewer | None:
    """Everything that the runs measured or logged, or None. Raises UserError for a broken documents.json."""
    shown, documents, measured = [], {}, False
    for run in runs:
        found = load(run.path)
        versions = list(_logged(run.positions) if found is None else _measured(found))
        if not versions:
            continue
        measured = measured or found is not None
        place = str(len(shown))
        shown.append({"name": visible(run.name), "model": None if found is None else visible(found.model)})
        for title, domain, version in versions:
            row = documents.setdefault(_free(title, place, documents), {"title": title, "domain": domain})
            row.setdefault("versions", {})[place] = version
    if not shown:
        return None
    rows = list(documents.values())
    script = Path(__file__).with_name("viewer.js").read_text(encoding="utf-8")
    return Viewer(
        measured=measured,
        data=_embedded({"runs": shown, "documents": rows, "limit": _limit(rows)}),
        script=Markup(script),
        source=f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'",
    )


def _free(title: str, place: str, documents: dict[Any, Any]) -> tuple[str, int]:
    """A key for a title: a run's second document of one name is not another version of the first."""
    count = 0
    while place in documents.get((title, count), {}).get("versions", {}):
        count += 1
    return title, count


def _measured(found: Documents) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    for one in found.documents:
        positions = sorted(one.positions, key=lambda position: position.at)
        domain = None if one.domain is None else visible(one.domain)
        yield visible(one.document), domain, _version(one.tokens, positions, _spaced(one.tokens))


def _logged(positions: list[Position]) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """A logged position as a document of two tokens: all that stands before the target, and the target."""
    spaced = _spaced([one.target for one in positions])
    for one in positions:
        thoughts = [
            ReadThought(
                text=each.text,
                length=each.length,
                closed=each.closed,
                evidence=each.evidence,
                reward=each.reward,
                advantage=each.advantage,
                top=[],
            )
            for each in one.thoughts
        ]
        place = ReadPosition(at=1, target=one.target, nothink=one.nothink, nothink_top=[], thoughts=thoughts)
        title = visible(f"step {one.step:,}: {one.document}, position {one.position}")
        yield title, f"step {one.step:,}", _version([one.context, one.target], [place], spaced)


def _spaced(tokens: list[str]) -> bool:
    """Whether the tokens are words that spaces must be put between: none of them brings its own."""
    return all(token == token.strip() for token in tokens)


def _version(tokens: list[str], positions: list[ReadPosition], spaced: bool) -> dict[str, Any]:
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
                "thoughts": [_thought(each) for each in sorted(one.thoughts, key=_rank)],
            }
            for one in positions
        ],
    }


def _thought(one: ReadThought) -> dict[str, Any]:
    return {
        "text": _shown(one.text),
        "length": None if one.length is None else int(one.length),
        "closed": one.closed,
        "evidence": one.evidence,
        "reward": one.reward,
        "advantage": one.advantage,
        "top": _top(one.top),
    }


def _rank(one: ReadThought) -> float:
    return math.inf if one.reward is None else -one.reward


def _shown(text: str) -> str:
    return visible(text, kept="\n")


def _top(top: list[tuple[str, float]]) -> list[list[str | float]]:
    return [[_shown(text), min(chance, 1.0)] for text, chance in top]


def _limit(documents: list[dict[str, Any]]) -> float:
    """The gain, in nats, that has the full colour."""
    versions = [version for one in documents for version in one["versions"].values()]
    gains = [place["gain"] for version in versions for place in version["positions"]]
    sizes = sorted(abs(gain) for gain in gains if gain is not None)
    usual = sizes[int(0.9 * len(sizes))] if sizes else 0.0
    return next((limit for limit in LIMITS if limit >= usual), LIMITS[-1])


def _embedded(value: Any) -> Markup:
    """JSON without the characters that could end or open an element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))
