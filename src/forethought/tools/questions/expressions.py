"""Values of formulas in simple LaTeX or plain text. Nothing that a model wrote is ever run as code.

A variable stands for a fixed random number, so two formulas that agree at two such points are, but for an accident,
the same: `x(x+1)` and `x^2 + x` need no algebra.
"""

import cmath
import math
import random
import re
from collections.abc import Callable

_LONGEST = 400  # characters; longer formulas have no value
_DEEPEST = 25  # open brackets

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)"
    r"|(?P<name>\\[a-zA-Z]+|(?:arc(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi)(?![a-zA-Z])|[a-zA-Z])"
    r"(?P<index>_\{[^{}]*\}|_\\[a-zA-Z]+|_[a-zA-Z0-9])?"
    r"|(?P<mark>[-+*/^(){}\[\]|!]))"
)

_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda z: 1 / cmath.tan(z),
    "sec": lambda z: 1 / cmath.cos(z),
    "csc": lambda z: 1 / cmath.sin(z),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "exp": cmath.exp,
    "ln": cmath.log,
    "log": cmath.log,
}
_CONSTANTS: dict[str, complex] = {"pi": complex(math.pi), "e": complex(math.e), "i": 1j}
_LETTER = re.compile(
    r"(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|chi"
    r"|psi|omega)|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega|hbar|ell|infty"
)
_WORD = re.compile(
    r"(?<![\\a-zA-Z])(?!arc(?:sin|cos|tan)|sqrt|(?:sin|cos|tan|cot|sec|csc|log|exp)(?![a-zA-Z]))[a-zA-Z]{3}"
)
_TIMES = {"*", r"\cdot", r"\times", r"\ast"}
_DIVIDED = {"/", r"\div"}
_PAIRS = {"(": ")", "[": "]", "{": "}", "|": "|"}


class _NoValueError(ValueError):
    """The text is no formula that this module reads."""


def value(text: str, point: int = 0) -> complex | None:
    """The formula's value where its variables take the random numbers of a point; None for what is no formula.

    Reads + - * / ^ ! |x|, implicit products, mixed numbers, \\frac, \\sqrt[n], \\binom, pi, e, i and common functions.
    Three letters in a row that name none of these are taken for a word, which has no value.
    """
    if len(text) > _LONGEST or sum(text.count(mark) for mark in "({[") > _DEEPEST or _WORD.search(text):
        return None
    try:
        reader = _Reader(_tokens(_spelled_out(text)), point)
        result = reader.sum()
        if reader.left():
            return None
    except (ValueError, ArithmeticError, RecursionError):
        return None
    return result if cmath.isfinite(result) else None


def _spelled_out(text: str) -> str:
    """Short forms in full: 1\\frac12 is a mixed number, \\frac12 and \\sqrt3 lack braces, f(0) is a name."""
    text = text.replace("**", "^")
    text = re.sub(r"(?<![\\a-zA-Z])([a-zA-Z])\((\d+)\)", r"\1_{\2}", text)
    text = re.sub(r"\\frac\s*(\d)", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\d.}^])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\\frac{\2}{\3})", text)
    return re.sub(r"(?<![\d./^}])(\d+)\s+(\d+)/(\d+)(?![\d.])", r"(\1+\2/\3)", text)


def _tokens(text: str) -> list[tuple[str, str, str]]:
    """(kind, text, index) of each token; kind is number, name or mark."""
    tokens, place, text = [], 0, text.strip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise _NoValueError
        place = found.end()
        kind = found.lastgroup if found.lastgroup != "index" else "name"
        tokens.append((kind, found[kind or 0], found["index"] or ""))
    return tokens


class _Reader:
    """Recursive descent over the tokens; each method reads one level of precedence and returns its value."""

    def __init__(self, tokens: list[tuple[str, str, str]], point: int):
        self._tokens, self._point, self._place = tokens, point, 0

    def left(self) -> bool:
        """Whether tokens remain."""
        return self._place < len(self._tokens)

    def sum(self) -> complex:
        """Terms with + and - between them."""
        total = self._product()
        while self._peek() in ("+", "-"):
            sign = 1 if self._next()[1] == "+" else -1
            total += sign * self._product()
        return total

    def _product(self) -> complex:
        result = self._signed()
        while self.left():
            text = self._peek()
            if text in _TIMES:
                self._next()
                result *= self._signed()
            elif text in _DIVIDED:
                self._next()
                result /= self._signed()
            elif self._starts_a_factor():
                result *= self._power()
            else:
                break
        return result

    def _starts_a_factor(self) -> bool:
        """Whether what follows is multiplied without a sign between; a number is not: `2 3` is no formula."""
        kind, text, _ = self._tokens[self._place]
        return kind == "name" or text in ("(", "{")

    def _signed(self) -> complex:
        sign = 1
        while self._peek() in ("+", "-"):
            sign *= 1 if self._next()[1] == "+" else -1
        return sign * self._power()

    def _power(self) -> complex:
        base = self._atom()
        if self._peek() == "!":
            self._next()
            base = _factorial(base)
        if self._peek() != "^":
            return base
        self._next()
        return base ** (self._signed() if self._peek() in ("+", "-") else self._power())

    def _atom(self) -> complex:
        kind, text, index = self._next()
        if kind == "number":
            return complex(float(text))
        if kind == "mark":
            return self._group(text)
        name = text.removeprefix("\\")
        if name in ("frac", "sqrt", "binom"):
            return self._command(name)
        if name in _FUNCTIONS:
            return self._function(name, index)
        if name in _CONSTANTS and not index:
            return _CONSTANTS[name]
        if name != text and not _LETTER.fullmatch(name):
            raise _NoValueError
        return complex(random.Random(f"{name}{index.strip('_{}')} {self._point}").uniform(0.5, 2))

    def _group(self, opening: str) -> complex:
        if opening not in _PAIRS:
            raise _NoValueError
        inside = self.sum()
        self._expect(_PAIRS[opening])
        return complex(abs(inside)) if opening == "|" else inside

    def _command(self, name: str) -> complex:
        if name == "sqrt":
            degree = 2 + 0j
            if self._peek() == "[":
                self._next()
                degree = self._group("[")
            return self._atom() ** (1 / degree)
        above, below = self._atom(), self._atom()
        if name == "frac":
            return above / below
        return _factorial(above) / (_factorial(below) * _factorial(above - below))

    def _function(self, name: str, index: str) -> complex:
        exponent = 1 + 0j
        if self._peek() == "^":
            self._next()
            exponent = self._atom()
            if exponent == -1:
                raise _NoValueError  # sin^-1 is an inverse to some and a reciprocal to others
        result = _FUNCTIONS[name](self._power())
        if index:
            base = value(index.strip("_{}"), self._point)
            if name != "log" or base is None:
                raise _NoValueError
            result /= cmath.log(base)
        return result**exponent

    def _peek(self) -> str:
        return self._tokens[self._place][1] if self.left() else ""

    def _next(self) -> tuple[str, str, str]:
        if not self.left():
            raise _NoValueError
        self._place += 1
        return self._tokens[self._place - 1]

    def _expect(self, text: str) -> None:
        if self._next()[1] != text:
            raise _NoValueError


def _factorial(z: complex) -> complex:
    whole = round(z.real)
    if z != whole or not 0 <= whole <= 170:
        raise _NoValueError
    return complex(math.factorial(whole))
