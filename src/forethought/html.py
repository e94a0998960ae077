"""What a notebook shows, as HTML. All text is escaped, and its control characters are made visible."""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup, escape

LIMITS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Gains in nats that may have the full color: the first one that nine tenths of all gains do not exceed."""
_HELPS, _HURTS = "0, 114, 178", "213, 94, 0"
_JOINERS = "\u200c\u200d"


def visible(text: str, kept: str = "") -> str:
    """Text with control and invisible characters made visible: a tab as ⇥, NUL as ⟨U+0000⟩.

    Characters in `kept` are not changed, and neither are the joiners that scripts and emoji need.
    """
    return "".join(char if char in kept or char in _JOINERS else _symbol(char) for char in text)


def _symbol(char: str) -> str:
    if char == "\t":
        return "⇥"
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return f"⟨U+{ord(char):04X}⟩"
    return char


def limit(gains: Iterable[float | None]) -> float:
    """The gain, in nats, that has the full color: one of LIMITS."""
    sizes = sorted(abs(gain) for gain in gains if gain is not None)
    usual = sizes[int(0.9 * len(sizes))] if sizes else 0.0
    return next((one for one in LIMITS if one >= usual), LIMITS[-1])


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> Markup:
    """A table of cells, which are text unless they are Markup."""
    head = _row("th", columns) if any(columns) else Markup("")
    body = Markup("\n").join(_row("td", cells) for cells in rows)
    title = Markup("<caption>{}</caption>\n").format(_text(caption)) if caption else Markup("")
    return Markup("<table>\n{}{}\n{}\n</table>\n").format(title, head, body)


def _row(tag: str, cells: Sequence[Any]) -> Markup:
    start = Markup(f'<{tag} style="text-align: left; vertical-align: top">')
    return Markup("<tr>{}</tr>").format(Markup("").join(start + _text(cell) + Markup(f"</{tag}>") for cell in cells))


def _text(value: Any) -> Markup:
    return value if isinstance(value, Markup) else escape(visible(str(value), kept="\n"))


def with_note(value: str, note: str) -> Markup:
    """A cell: a value, and a note in small print below it."""
    return Markup("{}<br><small>{}</small>").format(_text(value), _text(note)) if note else _text(value)


def colored(texts: Sequence[str], gains: Sequence[float]) -> Markup:
    """Tokens as text, blue where thoughts help and orange where they hurt, with their gains as titles."""
    full = limit(gains)
    span = Markup('<span style="background: rgba({}, {:.2f})" title="{:+.3f} nats">{}</span>')
    tokens = [
        span.format(_HELPS if gain > 0 else _HURTS, 0.6 * min(1.0, abs(gain) / full), gain, _text(text))
        for text, gain in zip(texts, gains, strict=True)
    ]
    return Markup('<p style="white-space: pre-wrap">{}</p>\n').format(Markup("").join(tokens))
