"""Windows -> positions to think at, and the template around a thought."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from forethought.config import Method, UserError, registry
from forethought.data.corpus import Window
from forethought.data.token_bytes import Closing


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Positions to think at in a few windows. Those of one window share it, so its prefix is read only once.

    Example: window [7, 8, 9], at 2, horizon 1: the context is [7, 8], the target [9].
    """

    windows: tuple[Window, ...]
    window: Int[Tensor, " batch"]  # index into `windows`
    at: Int[Tensor, " batch"]  # index t of the first target token in its window; at least 1
    horizon: int  # tokens of text scored after the thought

    def __len__(self) -> int:
        return len(self.at)

    def contexts(self) -> list[list[int]]:
        """x_<t of each position, without padding."""
        return [self.windows[w].tokens[:t] for w, t in zip(self.window.tolist(), self.at.tolist(), strict=True)]

    def targets(self) -> Int[Tensor, "batch horizon"]:
        """x_t .. x_(t + horizon - 1) of each position."""
        pairs = zip(self.window.tolist(), self.at.tolist(), strict=True)
        return torch.tensor([self.windows[w].tokens[t : t + self.horizon] for w, t in pairs])

    def select_windows(self, chosen: Sequence[int]) -> "tuple[Positions, list[int]]":
        """The positions in some of the windows (ascending indices), and their indices among all positions."""
        owners = self.window.tolist()
        index = {window: i for i, window in enumerate(chosen)}
        kept = [i for i, owner in enumerate(owners) if owner in index]
        windows = tuple(self.windows[window] for window in chosen)
        new_owners = torch.tensor([index[owners[i]] for i in kept], dtype=torch.long)
        return replace(self, windows=windows, window=new_owners, at=self.at[kept]), kept

    def chunks(self, size: int) -> "Iterator[Positions]":
        """Chunks of whole windows with at most `size` positions each, or a single window."""
        start = 0
        while start < len(self):
            end = self.window_boundary(start, size, at_least=True)
            yield self.slice(start, end)
            start = end

    def chunks_of_tokens(self, tokens: int) -> "Iterator[Positions]":
        """Chunks of whole windows that hold about `tokens` tokens once padded, or a single window."""
        longest = max(len(window.tokens) for window in self.windows)
        return self.chunks(max(1, tokens // longest) * max(1, len(self) // len(self.windows)))

    def window_boundary(self, start: int, size: int, at_least: bool) -> int:
        """The end of the positions from `start` on that fill whole windows, at most `size` of them.

        If not even the first window fits: its end with `at_least`, else `start`.
        """
        owners = self.window.tolist()
        edges = [i for i in range(start + 1, len(owners)) if owners[i] != owners[i - 1]] + [len(owners)]
        fitting = [edge for edge in edges if edge - start <= size]
        return fitting[-1] if fitting else edges[0] if at_least else start

    def slice(self, start: int, end: int) -> "Positions":
        """Positions start .. end-1, with their windows."""
        first, last = int(self.window[start]), int(self.window[end - 1])
        owners = self.window[start:end] - first
        return replace(self, windows=self.windows[first : last + 1], window=owners, at=self.at[start:end])


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtFormat:
    """The template around a thought: `before x_<t after open c close x_t`. The no-think score sees only x_<t.

    With `repeat` the last tokens of the context are read again before x_t: with 2 of `The cat sat`, `... close cat sat
    x_t`. What is read between a thought and the text, the delimiter and these tokens, is the bridge.

    A thought ends with the sampled token that completes the text of the closing delimiter, in whatever tokens: that
    token is credited as it was sampled, and what is read after the thought is `close`, in the place of that token and
    of those before it that begin `close`. Example: close = `</` `think` `>`, sampled `so` `</` `think` `>\\n`: the
    text is read after `so` `</` `think` `>`. Without a tokenizer (`closing` is None) only `close` itself ends it.
    """

    before: tuple[int, ...]  # prompt template before the context (but after a leading BOS)
    after: tuple[int, ...]  # prompt template after the context
    open: tuple[int, ...]
    close: tuple[int, ...]
    bos: int | None
    pad: int  # fills masked positions; never seen by the model
    end: tuple[int, ...] = ()  # after a prediction (RPT); empty: predictions have a fixed length
    repeat: int = 0  # tokens at the end of the context that are repeated after `close`
    vocabulary: int | None = None  # token ids from here on cannot be decoded, and are never sampled
    holes: tuple[int, ...] = ()  # smaller token ids that cannot be decoded either
    closing: Closing = field(default=cast(Closing, None), compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.closing is None:
            object.__setattr__(self, "closing", Closing.of_tokens(self.close))

    def decodable(self, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows known"]:
        """Logits without token ids that cannot be decoded: none from `vocabulary` on, and -inf in holes."""
        logits = logits[..., : self.vocabulary]
        if not self.holes:  # as with nearly all tokenizers; this runs for every token
            return logits
        holes = torch.tensor([token for token in self.holes if token < logits.shape[-1]], device=logits.device)
        return logits.index_fill(-1, holes.long(), float("-inf"))

    def content(self, tokens: Sequence[int], closed: bool) -> list[int]:
        """A thought's tokens without those of a closing delimiter."""
        if not closed:
            return list(tokens)
        sizes = [k for k in range(len(self.close)) if k < len(tokens) and self.close[:k] == tuple(tokens[-1 - k : -1])]
        return list(tokens[: len(tokens) - 1 - max(sizes)])

    def prompt_tokens(self, context: list[int]) -> list[int]:
        """What the model reads before a thought, including the opening delimiter."""
        return [*self.prefix_tokens(context), *self.after, *self.open]

    def prefix_tokens(self, context: list[int]) -> list[int]:
        """The part of the prompt that all positions of a document share: up to the end of the context."""
        head = context[:1] if self.bos is not None and context[:1] == [self.bos] else []
        return [*head, *self.before, *context[len(head) :]]

    def bridge(self, context: Sequence[int]) -> list[int]:
        """What is read between a thought and the text."""
        return [*self.close, *self.repeated(context)]

    def repeated(self, context: Sequence[int]) -> list[int]:
        """The last `repeat` tokens of a context; a shorter one repeats its first token."""
        return [context[max(0, len(context) - k)] for k in range(self.repeat, 0, -1)]

    def documents_and_prefix_lengths(self, positions: Positions) -> tuple[list[list[int]], list[list[int]]]:
        """Each window's tokens up to its last position, and how many of them precede each of its positions."""
        lengths: dict[int, list[int]] = {}
        for window, t in zip(positions.window.tolist(), positions.at.tolist(), strict=True):
            lengths.setdefault(window, []).append(t + len(self.before))
        documents = [
            self.prefix_tokens(positions.windows[window].tokens[: some[-1] - len(self.before)])
            for window, some in lengths.items()
        ]
        return documents, list(lengths.values())

    @property
    def overhead(self) -> int:
        """Tokens that the template adds to a context and a thought."""
        return len(self.before) + len(self.after) + len(self.open) + len(self.close) + self.repeat


def thought_format(tokenizer: Any, options: Method) -> ThoughtFormat:
    """Encode the template and the delimiters. Raises UserError for text that the tokenizer cannot encode."""

    def encode(option: str, text: str) -> tuple[int, ...]:
        tokens = tokenizer.encode(text, add_special_tokens=False) if text else []
        unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens
        if (text and not tokens) or (unknown and tokenizer.unk_token not in text):  # GPT-2's is its <|endoftext|>
            raise UserError(f"method.{option} = {text!r}: the tokenizer cannot encode it; choose text that it knows")
        return tuple(tokens)

    before, _, after = options.prompt.partition("{context}")
    known, close = set(tokenizer.get_vocab().values()), encode("close", options.close)
    vocabulary = max(known) + 1
    closing = Closing.of_text(tokenizer, options.close, close)
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return ThoughtFormat(
        open=encode("open", options.open),
        close=close,
        end=encode("end", options.end),
        before=encode("prompt", before),
        after=encode("prompt", after),
        bos=tokenizer.bos_token_id,
        repeat=options.repeat_context,
        pad=next(token for token in pads if token in known),
        vocabulary=vocabulary,
        holes=tuple(sorted(set(range(vocabulary)) - known)),
        closing=closing.with_minimum(options.shortest_thought),
    )


def make_generator(seed: int, *keys: object) -> torch.Generator:
    """A separate CPU generator for each purpose: stateless, so a resumed run draws the same numbers."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def uniform(window: Window, count: int, options: Method, generator: torch.Generator) -> list[int]:
    """Distinct positions, uniformly at random (the paper, with count 1)."""
    choices = len(window.tokens) - options.horizon
    return (torch.randperm(choices, generator=generator)[:count] + 1).tolist()


def stride(window: Window, count: int, options: Method, generator: torch.Generator) -> list[int]:
    """Evenly spaced positions from a random start."""
    choices = len(window.tokens) - options.horizon
    count = min(count, choices)
    start = float(torch.rand((), generator=generator))
    return [1 + int((start + k) * choices / count) for k in range(count)]


def marked(window: Window, count: int, options: Method, generator: torch.Generator) -> list[int]:
    """Distinct positions, each at a token marked in the corpus with probability `marked_share`, else uniform."""
    last = len(window.tokens) - options.horizon
    marks = sorted({t for indices in window.marks.values() for t in indices if 1 <= t <= last})
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
    """Distinct positions, uniformly among those whose next-token entropy is at least `min_entropy` nats.

    `entropy` has a value for every position from 1 on. If too few reach the threshold, those of highest entropy.
    """
    high = (entropy >= options.min_entropy).nonzero().squeeze(-1)
    if len(high) >= count:
        chosen = high[torch.randperm(len(high), generator=generator)[:count]]
    else:
        chosen = entropy.argsort(descending=True, stable=True)[:count]
    return (chosen + 1).tolist()


def draw_positions(
    windows: Sequence[Window], options: Method, generator: torch.Generator, entropies: Sequence[Tensor] = ()
) -> Positions:
    """K positions in each window (fewer in short windows) by the configured policy, in ascending order.

    A policy is a function (window, count, options, generator) -> token indices. One whose registry entry has `proxy`
    gets the entropies of the window's positions instead of the window. Raises UserError if it returns an index without
    a target.
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


def at_positions(windows: Sequence[Window], indices: Sequence[Sequence[int]], horizon: int) -> Positions:
    """Positions at given token indices of each window."""
    owners = [w for w, chosen in enumerate(indices) for _ in chosen]
    return Positions(
        windows=tuple(windows),
        window=torch.tensor(owners, dtype=torch.long),
        at=torch.tensor([t for chosen in indices for t in chosen], dtype=torch.long),
        horizon=horizon,
    )


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, left: bool
) -> tuple[Int[Tensor, "row width"], Bool[Tensor, "row width"]]:
    """Rows of different lengths as one padded tensor and its mask (True at real tokens)."""
    real, side = [torch.tensor(row, dtype=torch.long) for row in rows], "left" if left else "right"
    tokens = pad_sequence(real, batch_first=True, padding_value=pad, padding_side=side)
    ones = [torch.ones_like(row, dtype=torch.bool) for row in real]
    return tokens, pad_sequence(ones, batch_first=True, padding_value=False, padding_side=side)
