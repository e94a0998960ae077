"""The final answer in a generated text, and whether it is the reference.

Written answers are compared as normalised text, as exact numbers, as values of formulas (expressions.py) and piece by
piece where they are sets, lists, tuples or intervals; then, where math-verify is installed (the extra `eval`), it may
still accept what these did not. `checker` says which of the two a figure rests on.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from forethought.tools.questions.expressions import value

LETTERS = "ABCDEFGHIJ"
_ROUNDING = 1e-6  # relative difference up to which two values of formulas are one
_ZERO = 1e-12  # size up to which a value is zero
_PATIENCE_S = 5  # that math-verify may spend on one answer

_SAID = re.compile(r"(?:final\s+|correct\s+|right\s+)?(?:answer|option|choice)\s*(?:is|are|was|:|=)\s*", re.IGNORECASE)
_FILLER = re.compile(
    r"^(?:is\b|are\b|therefore\b|thus\b|then\b|simply\b|just\b|approximately\b|about\b|exactly\b|equal to\b|option\b|"
    r"choice\b|[:=≈~,*\s]|\\approx(?![a-z]))+",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w.)}])-?[$£€]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?(?:\s*\\?%)?|\d[\d,]*(?:\.\d+)?")
_DECIMAL = re.compile(r"[-+]?(?:\d{1,300}(?:\.\d{0,300})?|\.\d{1,300})(?:[eE][-+]?\d{1,3})?")
_UNIT = re.compile(
    r"(?P<number>[-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*(?P<unit>(?:[a-zA-Z]{2,}|(?<=\s)[msghJNWVAKCFLT])"
    r"(?:\^?\{?-?\d\}?)?(?:[ /·.-]+[a-zA-Z]+(?:\^?\{?-?\d\}?)?)*\.?)"
)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NOT_UNITS = {"pi", "and", "or", "to", "sqrt", "over", "squared", "cubed", "dozen", "percent", "times", "plus", "minus"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came out of one text."""

    extracted: str | None  # the final answer as it was written; None where there is none
    how: str  # boxed | marked (####) | said ("the answer is") | last (the last number or letter) | nothing
    right: bool


def judge(text: str, reference: str, tolerance: float = 0.0) -> Verdict:
    """Extract a written answer and compare it with the reference; `tolerance` is a relative one, for numbers."""
    extracted, how = extract(text)
    right = extracted is not None and matches(extracted, reference, tolerance)
    return Verdict(extracted=extracted, how=how, right=right)


def judge_letter(text: str, reference: str, choices: int) -> Verdict:
    """Extract the letter of a choice, one of the first `choices` capitals, and compare it with the reference."""
    extracted, how = extract_letter(text, choices)
    return Verdict(extracted=extracted, how=how, right=extracted == reference)


def checker() -> str:
    """What written answers are checked with here: `plain`, or `plain or math-verify VERSION`."""
    return f"plain or math-verify {importlib.metadata.version('math-verify')}" if _math_verify() else "plain"


def extract(text: str) -> tuple[str | None, str]:
    """The final answer of a text and how it was found: the last box, else the last ####, ..., else the last number."""
    if boxed := _boxes(text):
        return boxed[-1], "boxed"
    if marked := re.findall(r"####[ \t]*(\S[^\n]*)", text):
        return marked[-1].strip(), "marked"
    for place in reversed([found.end() for found in _SAID.finditer(text)]):
        if said := _statement(text[place:]):
            return said, "said"
    numbers = _NUMBER.findall(text)
    return (numbers[-1].strip().rstrip(","), "last") if numbers else (None, "nothing")


def extract_letter(text: str, choices: int) -> tuple[str | None, str]:
    """The letter that a text settles on, and how it was found; None where there is no letter of a choice."""
    letter = f"[{LETTERS[:choices]}]"
    for box in reversed(_boxes(text)):
        if found := re.fullmatch(rf"\(?({letter})(?:[).:].*)?", _plain_words(box).strip(), re.DOTALL):
            return found[1], "boxed"
    text = _plain_words(text)
    for place in reversed([found.end() for found in _SAID.finditer(text)]):
        if found := re.match(rf"[\s(*$:]*({letter})(?![\w'])", _FILLER.sub("", text[place:])):
            return found[1], "said"
    if found := re.match(rf"\s*\(?({letter})(?:[).:,\n]|\s*$)", text):
        return found[1], "said"
    found = re.findall(rf"\(({letter})\)|(?<![\w'-])({letter})(?=[).,:;]|\s*$)", text)
    if not found:  # "A" and "I" are words too
        found = re.findall(rf"(?<![\w'-])((?![AI]){letter})()(?![\w'])", text)
    return ("".join(found[-1]), "last") if found else (None, "nothing")


def matches(answer: str, reference: str, tolerance: float = 0.0) -> bool:
    """Whether two written answers are the same. Not symmetric: units and words after an answer's number are dropped."""
    mine, theirs = normalise(answer), normalise(reference)
    bare = _without_unit(mine, theirs)
    if _same(mine, theirs, tolerance) or (bare != mine and _same(bare, theirs, tolerance)):
        return True
    return _verified(answer, reference)


def normalise(text: str) -> str:
    """One spelling for what is written in many: spacing, delimiters, \\dfrac, \\text, degrees, money, 1,000, x = 5."""
    text = text.strip("* \n\t").replace(r"\$", "$").replace("−", "-").replace("–", "-").replace("×", r"\times ")
    text = re.sub(r"(?<!\\)\\[()\[\]!]|[$£€]", "", text)
    text = re.sub(r"\\(?:left|right|displaystyle|bigl?|bigr?|Bigl?|Bigr?)(?![a-zA-Z])", "", text)
    text = re.sub(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\s+", " ", text).replace("{,}", ",")
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])|°|\bdegrees?\b", "", text)
    text = re.sub(r"\\?%|\s*\bpercent\b", "%", text)
    text = re.sub(r"\\(ge|le)q(?![a-zA-Z])", r"\\\1", text)
    text = re.sub(
        r"(?<=[\w)}])\s*\\(?:text|mathrm|mbox|operatorname)\s*\{(?!\s*(?:and|or)\b)[^{}]*\}(?:\^\{?-?\d\}?)?", "", text
    )
    text = _plain_words(text).strip().rstrip(".").strip()
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:[^\d,].*)?", text):
        text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", _named(text)[1])


def _named(text: str) -> tuple[str, str]:
    """What an answer is said to be, and the answer: `x = 5` or `f(x) = 5` as x or f(x), and 5."""
    name = r"\s*((?:[a-zA-Z]|\\[a-z]+)(?:_\w|_\{[^{}]*\})?(?:\([a-z]\))?)\s*(?:=|\\in(?![a-z]))\s*([^=]*)"
    found = re.fullmatch(name, text)
    return (found[1], found[2]) if found else ("", text)


def _plain_words(text: str) -> str:
    """Words without the LaTeX command around them."""
    return re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r"\1", text)


def _same(answer: str, reference: str, tolerance: float) -> bool:
    if not answer or not reference:
        return False
    if _squeezed(answer) == _squeezed(reference):
        return True
    if "%" in answer + reference:
        return _same_percentage(answer, reference, tolerance)
    (kind, mine), (wanted, theirs) = _pieces(answer), _pieces(reference)
    if len(mine) > 1 or len(theirs) > 1:
        alike = kind == wanted and len(mine) == len(theirs)
        return alike and _same_pieces(_normalised(mine), _normalised(theirs), kind == "{}", tolerance)
    if kind or wanted:
        return _same(normalise(mine[0]), normalise(theirs[0]), tolerance)
    return _same_number(answer, reference, tolerance)


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text).casefold()


def _same_percentage(answer: str, reference: str, tolerance: float) -> bool:
    """50% is 50%, 50 (the question asked for per cent) and 0.5."""
    bare, wanted = answer.replace("%", ""), reference.replace("%", "")
    if _same(bare, wanted, tolerance):
        return True
    if ("%" in answer) == ("%" in reference):
        return False
    scaled = (f"({bare})/100", wanted) if "%" in answer else (bare, f"({wanted})/100")
    return _same_number(*scaled, tolerance)


def _same_number(answer: str, reference: str, tolerance: float) -> bool:
    """Plain decimals are compared exactly, or within the tolerance; formulas by their values at two points."""
    if _DECIMAL.fullmatch(answer) and _DECIMAL.fullmatch(reference):
        mine, theirs = Fraction(answer), Fraction(reference)
        return abs(mine - theirs) <= Fraction(tolerance) * abs(theirs)
    allowed = max(tolerance, _ROUNDING)
    for point in (0, 1):
        mine, theirs = value(answer, point), value(reference, point)
        if mine is None or theirs is None or abs(mine - theirs) > (allowed * abs(theirs) or _ZERO):
            return False
    return True


def _same_pieces(mine: Sequence[str], theirs: Sequence[str], any_order: bool, tolerance: float) -> bool:
    """Pairs in order, or each with some piece that none before it took."""
    if not any_order:
        return all(_same(one, other, tolerance) for one, other in zip(mine, theirs, strict=True))
    left = list(theirs)
    for one in mine:
        found = next((i for i, other in enumerate(left) if _same(one, other, tolerance)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _pieces(text: str) -> tuple[str, list[str]]:
    """Kind of brackets and what is inside: (1,2) is "()", {1,2} and a bare list "{}", one piece alone ""."""
    text = text.strip()
    if found := re.fullmatch(r"\\begin\{([pbvB]?matrix)\}(.*)\\end\{\1\}", text, re.DOTALL):
        return found[1], re.split(r"\\\\|&", found[2])
    if (text[:2], text[-2:]) == (r"\{", r"\}"):
        return "{}", _split(text[2:-2])
    if text[:1] in ("(", "[", "{") and text[-1:] in (")", "]", "}") and _closes_last(text):
        inside = _split(text[1:-1])
        if len(inside) > 1:
            return text[0] + text[-1], inside
    unions = re.split(r"\\cup(?![a-zA-Z])", text)
    pieces = unions if len(unions) > 1 else _split(text)
    if len(pieces) == 1 and text.count(r"\pm") == 1:
        pieces = [text.replace(r"\pm", "+"), text.replace(r"\pm", "-")]
    return ("{}", pieces) if len(pieces) > 1 else ("", [text])


def _normalised(pieces: Sequence[str]) -> list[str]:
    """Pieces in one spelling; names stay where they differ, so that x=1, y=2 is not x=2, y=1."""
    names = {_named(piece)[0] for piece in pieces}
    return [normalise(piece) if len(names) == 1 else piece.strip() for piece in pieces]


def _closes_last(text: str) -> bool:
    """Whether the bracket that opens a text is closed by its last character and not before."""
    depths = _depths(text)
    return depths[-1] == 0 and all(depth > 0 for depth in depths[:-1])


def _split(text: str) -> list[str]:
    """Pieces between commas, semicolons, `and` and `or` that are inside no bracket."""
    depths = _depths(text)
    marks = re.finditer(r"[,;]\s*(?:and\b|or\b)?|\band\b|\bor\b", text)
    cuts = [(found.start(), found.end()) for found in marks if depths[found.start()] == 0]
    edges = [(0, 0), *cuts, (len(text), len(text))]
    return [text[one[1] : other[0]] for one, other in pairwise(edges)]


def _depths(text: str) -> list[int]:
    """Open brackets after each character; a set's braces and an interval's unequal brackets count alike."""
    depth, depths = 0, []
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        depths.append(depth)
    return depths


def _without_unit(answer: str, reference: str) -> str:
    """`5 cm` as 5 and `5 thousand` as 5000, where the reference is a plain number."""
    found = _UNIT.fullmatch(answer)
    if found is None or not _DECIMAL.fullmatch(reference):
        return answer
    first = re.split(r"[^a-zA-Z]", found["unit"], maxsplit=1)[0].lower()
    if first in _SCALES:
        return str(Fraction(found["number"]) * _SCALES[first]) if _DECIMAL.fullmatch(found["number"]) else answer
    return answer if first in _NOT_UNITS else found["number"]


def _boxes(text: str) -> list[str]:
    """Contents of every \\boxed{} and \\fbox{} whose braces close, in the order of their ends; no empty ones."""
    boxes: list[str] = []
    open_braces: list[int | None] = []  # where a box's content begins; None for any other brace
    for found in re.finditer(r"\\(?:boxed|fbox)\s*\{|[{}]", text):
        if found[0] != "}":
            open_braces.append(found.end() if len(found[0]) > 1 else None)
        elif open_braces and (start := open_braces.pop()) is not None:
            boxes.append(text[start : found.start()].strip())
    return [box for box in boxes if box]


def _statement(text: str) -> str:
    """What is stated at the head of a text: its formula, or the words up to the end of the sentence."""
    line = _FILLER.sub("", text.lstrip().split("\n")[0])
    found = re.match(r"[^$\\.]{0,20}(?:\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\])", line)
    formula = next((group for group in found.groups() if group), "") if found else ""
    if formula and not re.search(r"\s[a-zA-Z]{3}", formula):  # else the signs are dollars
        return formula.strip().rstrip(".,")
    line = re.split(r"\.(?!\d)|[;!?]|,? (?:because|since|so|which|as|for)\b|\*\*", line, maxsplit=1)[0]
    return line.strip().rstrip(",")


@functools.cache
def _math_verify() -> Any:
    """The package math-verify, or None where it is not installed."""
    return importlib.import_module("math_verify") if importlib.util.find_spec("math_verify") else None


def _verified(answer: str, reference: str) -> bool:
    """What math-verify says; it stops itself by an alarm, which only the main thread can set."""
    library = _math_verify()
    if library is None:
        return False
    patience = _PATIENCE_S if threading.current_thread() is threading.main_thread() else None
    gold, target = (library.parse(f"${text.strip(' $')}$", parsing_timeout=patience) for text in (reference, answer))
    return bool(library.verify(gold, target, timeout_seconds=patience))
