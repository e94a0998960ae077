"""Tokens -> positions: where in a window the model is asked to think, and what surrounds a thought there."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from forethought.config import Method, UserError, registry
from forethought.data.corpus import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Positions to think in a few windows. K places of one window share it, so that its prefix need be read once.

    Example: window [7, 8, 9], at 2, horizon 1: the context is [7, 8], the target [9].
    """

    windows: tuple[Window, ...]
    window: Int[Tensor, " batch"]  # index into `windows`
    at: Int[Tensor, " batch"]  # index t of the first target token in its window; at least 1
    horizon: int  # true tokens scored after the thought

    def __len__(self) -> int:
        return len(self.at)

    def contexts(self) -> list[list[int]]:
        """x_<t of each position, not padded."""
        return [self.windows[w].tokens[:t] for w, t in zip(self.window.tolist(), self.at.tolist(), strict=True)]

    def targets(self) -> Int[Tensor, "batch horizon"]:
        """x_t and the tokens after it, as many as the horizon."""
        pairs = zip(self.window.tolist(), self.at.tolist(), strict=True)
        return torch.tensor([self.windows[w].tokens[t : t + self.horizon] for w, t in pairs])

    def select_windows(self, chosen: Sequence[int]) -> "tuple[Positions, list[int]]":
        """The positions in some of the windows (indices, ascending), and which ones of all these they are."""
        owners = self.window.tolist()
        places = {window: place for place, window in enumerate(chosen)}
        numbers = [i for i, owner in enumerate(owners) if owner in places]
        some = Positions(
            windows=tuple(self.windows[window] for window in chosen),
            window=torch.tensor([places[owners[i]] for i in numbers], dtype=torch.long),
            at=self.at[numbers],
            horizon=self.horizon,
        )
        return some, numbers

    def chunks(self, size: int) -> "Iterator[Positions]":
        """Pieces of whole windows with about `size` positions each (at least one window)."""
        start = 0
        while start < len(self):
            end = self.window_boundary(start, size, at_least=True)
            yield self.slice(start, end)
            start = end

    def window_boundary(self, start: int, size: int, at_least: bool) -> int:
        """The end of the next positions from `start` on that fill whole windows, `size` at most.

        With `at_least`, one window even where it holds more; without, `start` itself where none fits.
        """
        owners = self.window.tolist()
        edges = [i for i in range(start + 1, len(owners)) if owners[i] != owners[i - 1]] + [len(owners)]
        fitting = [edge for edge in edges if edge - start <= size]
        return fitting[-1] if fitting else edges[0] if at_least else start

    def slice(self, start: int, end: int) -> "Positions":
        """Positions start .. end-1, with the windows that they are in."""
        first, last = int(self.window[start]), int(self.window[end - 1])
        return Positions(
            windows=self.windows[first : last + 1],
            window=self.window[start:end] - first,
            at=self.at[start:end],
            horizon=self.horizon,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtFormat:
    """The tokens around a thought: `before x_<t after open c close x_t`. The no-think score sees only x_<t."""

    before: tuple[int, ...]  # prompt template ahead of the context (behind a leading BOS)
    after: tuple[int, ...]  # rest of the template
    open: tuple[int, ...]
    close: tuple[int, ...]
    bos: int | None
    pad: int  # fills masked places; never seen by the model
    end: tuple[int, ...] = ()  # behind a prediction (RPT); empty: predictions have a fixed length

    def prompt_tokens(self, context: list[int]) -> list[int]:
        """The context as the thinking model reads it, up to and with the opening delimiter."""
        return [*self.prefix_tokens(context), *self.after, *self.open]

    def prefix_tokens(self, context: list[int]) -> list[int]:
        """The part of it that all places of a document share: up to and with the context."""
        head = context[:1] if self.bos is not None and context[:1] == [self.bos] else []
        return [*head, *self.before, *context[len(head) :]]

    def documents_and_prefix_lengths(self, positions: Positions) -> tuple[list[list[int]], list[list[int]]]:
        """What thinking at these positions reads, each window once: tokens, and how many of them precede each place."""
        stops: dict[int, list[int]] = {}
        for window, t in zip(positions.window.tolist(), positions.at.tolist(), strict=True):
            stops.setdefault(window, []).append(t + len(self.before))
        texts = [
            self.prefix_tokens(positions.windows[w].tokens[: some[-1] - len(self.before)]) for w, some in stops.items()
        ]
        return texts, list(stops.values())

    @property
    def overhead(self) -> int:
        """Tokens that a thought's surroundings add to a context."""
        return len(self.before) + len(self.after) + len(self.open) + len(self.close)


def thought_format(tokenizer: Any, options: Method) -> ThoughtFormat:
    """Encode template and delimiters. Raises UserError for a delimiter that the tokenizer cannot encode."""
    before, _, after = options.prompt.partition("{context}")
    encoded = {}
    texts = {"open": options.open, "close": options.close, "end": options.end}
    for option, text in (*texts.items(), ("prompt", before), ("prompt", after)):
        tokens = tokenizer.encode(text, add_special_tokens=False) if text else []
        if (text and not tokens) or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens):
            raise UserError(f"method.{option} = {text!r}: the tokenizer cannot encode it; choose text that it knows")
        encoded[text] = tuple(tokens)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return ThoughtFormat(
        before=encoded[before],
        after=encoded[after],
        open=encoded[options.open],
        close=encoded[options.close],
        bos=tokenizer.bos_token_id,
        pad=pad if pad is not None else 0,
        end=encoded[options.end],
    )


def make_generator(seed: int, *keys: object) -> torch.Generator:
    """A CPU generator of its own for each purpose: stateless, so a resumed run draws what it would have drawn."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def uniform(window: Window, count: int, options: Method, generator: torch.Generator) -> list[int]:
    """Distinct positions, each as likely as any other (the paper's choice, with count 1)."""
    choices = len(window.tokens) - options.horizon
    return (torch.randperm(choices, generator=generator)[:count] + 1).tolist()


def stride(window: Window, count: int, options: Method, generator: torch.Generator) -> list[int]:
    """Evenly spaced positions from a random start."""
    choices = len(window.tokens) - options.horizon
    count = min(count, choices)
    start = float(torch.rand((), generator=generator))
    return [1 + int((start + k) * choices / count) for k in range(count)]


def marked(window: Window, count: int, options: Method, generator: torch.Generator) -> list[int]:
    """Each position with chance `marked_share` at a token that the corpus marks, else uniform; never one twice."""
    last = len(window.tokens) - options.horizon
    marks = sorted({t for places in window.marks.values() for t in places if 1 <= t <= last})
    others = uniform(window, last, options, generator)
    chosen: list[int] = []
    while len(chosen) < min(count, last):
        left = [t for t in marks if t not in chosen]
        if left and float(torch.rand((), generator=generator)) < options.marked_share:
            chosen.append(left[int(torch.randint(len(left), (), generator=generator))])
        else:
            chosen.append(next(t for t in others if t not in chosen))
    return chosen


def uncertain(entropy: Float[Tensor, " choice"], count: int, options: Method, generator: torch.Generator) -> list[int]:
    """Distinct positions, each as likely as any other among those whose next token has `min_entropy` nats or more.

    `entropy` holds a number for every position from 1 on. Where fewer positions reach it, the next lower ones too.
    """
    high = (entropy >= options.min_entropy).nonzero().squeeze(-1)
    if len(high) >= count:
        chosen = high[torch.randperm(len(high), generator=generator)[:count]]
    else:
        chosen = entropy.argsort(descending=True, stable=True)[:count]
    return (chosen + 1).tolist()


def draw_positions(
    windows: Sequence[Window],
    options: Method,
    generator: torch.Generator,
    entropies: Sequence[Tensor] = (),
) -> Positions:
    """K positions in each window (fewer where a window is shorter), by the configured policy, in reading order.

    A policy is a function (window, count, options, generator) -> token indices. One whose registry entry has `proxy`
    takes the entropies of the window's positions in place of the window. Raises UserError for a policy from outside
    the package that returns an index without a target.
    """
    name = options.policy
    policy, proxy = registry.load("position_policy", name), registry.entry("position_policy", name).proxy
    found = []
    for i, window in enumerate(windows):
        chosen = sorted(policy(entropies[i] if proxy else window, options.positions, options, generator))
        last = len(window.tokens) - options.horizon
        if not chosen or len(set(chosen)) < len(chosen) or chosen[0] < 1 or chosen[-1] > last:
            raise UserError(
                f"method.position_policy = {name!r}: returned {chosen[:8]} for {len(window.tokens)} tokens; "
                f"must be distinct indices from 1 to {last}"
            )
        found.append(chosen)
    return at_positions(windows, found, options.horizon)


def at_positions(windows: Sequence[Window], places: Sequence[Sequence[int]], horizon: int) -> Positions:
    """Positions at given token indices of each window."""
    owners = [w for w, chosen in enumerate(places) for _ in chosen]
    return Positions(
        windows=tuple(windows),
        window=torch.tensor(owners, dtype=torch.long),
        at=torch.tensor([t for chosen in places for t in chosen], dtype=torch.long),
        horizon=horizon,
    )


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, left: bool
) -> tuple[Int[Tensor, "row width"], Bool[Tensor, "row width"]]:
    """Rows of unequal length as one tensor and its mask (True at real tokens), padded on the left or the right."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = True
    return tokens, mask
