"""Corpus and model text, and numbers, in a form that can be read on a page."""

import unicodedata

from forethought.tools.report.runs import number

_JOINERS = "\u200c\u200d"
MINUS, UNBROKEN = "\u2212", "\u00a0"


def visible(text: str, kept: str = "") -> str:
    """Text in which every control and invisible character is a sign: a tab ⇥, NUL ⟨U+0000⟩.

    Characters in `kept` stay as they are, and so do the joiners that scripts and emoji are written with.
    """
    return "".join(char if char in kept or char in _JOINERS else _sign(char) for char in text)


def _sign(char: str) -> str:
    if char == "\t":
        return "⇥"
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return f"⟨U+{ord(char):04X}⟩"
    return char


def figure(value: float | None, unit: str = "nats") -> str:
    """A number as the page writes it: three decimals of nats, shares in percent, one decimal of anything else."""
    value = number(value)
    if value is None:
        return "–"
    if unit == "share":
        shown = f"{100 * value:.1f}{UNBROKEN}%"
    elif unit == "nats":
        shown = f"{value:.3f}"
    else:
        shown = f"{value:,.1f}"
    # "-0.000" would claim a sign that the shown digits do not have.
    negative = shown.startswith("-") and any(char in "123456789" for char in shown)
    return (MINUS if negative else "") + shown.removeprefix("-")


def signed(value: float | None, unit: str = "nats") -> str:
    """As `figure`, with a plus sign before what is above zero."""
    shown = figure(value, unit)
    return f"+{shown}" if any(char in "123456789" for char in shown) and not shown.startswith(MINUS) else shown


def duration(seconds: float) -> str:
    """Wall time in the two largest units that fit: 45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = round(seconds)
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {small}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
