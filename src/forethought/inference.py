"""Inference with thoughts: next-token predictions, scores of text, and generation.

A thought is inserted before the token that it helps to predict, as in training (x_<t <think> c </think> x_t, with
method.repeat_context the end of x_<t once more before x_t), and later thoughts do not see it. Several thoughts at a
position form a mixture: p(x | x_<t) = 1/k sum_i p(x | x_<t, c_i). The probability of several tokens after the same
thoughts is the mean over thoughts, too.
"""

import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forethought.algo.metrics import decode_thoughts
from forethought.config import Config, Method, UserError, from_dict, merge
from forethought.data.corpus import Window, context_tokens
from forethought.data.positions import Positions, ThoughtFormat, at_positions, make_generator, thought_format
from forethought.eval.viewer import token_texts
from forethought.html import colored, table
from forethought.models.compute_copy import compute_copy
from forethought.models.loading import (
    context_window,
    load_model,
    load_thinking_options,
    load_tokenizer,
    require_context,
)
from forethought.models.logprobs import (
    chunk_tokens,
    entropy,
    log_probabilities,
    no_think_entropy,
    no_think_scores,
    suffix_logits,
)
from forethought.rollout import Thoughts, draw_noise, engine, thought_tokens
from forethought.rollout.decoder import COMPACT, EagerBackend, ReplicatedBatch, probe_copies, sample
from forethought.rollout.native import NativeEngine

_TAIL = 8  # tokens decoded to find the text that the last one adds; a character has at most 4
_STRONGEST = 6  # tokens in the table of gains
_MAX_LOGITS = 2**26  # logits in memory at once
_CONDITION = re.compile(r"\s*entropy\s*(>=?)\s*([-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)\s*", re.IGNORECASE)
Text = str | Sequence[int]
Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a context and of its continuation
Stop = Callable[[Sequence[int]], bool]  # whether a row that has generated these tokens is finished
Rule = Callable[[float], bool]  # whether to think where the plain prediction has this entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw tokens, and how many. Raises UserError for values that are out of range."""

    limit: int  # longest text, in generated tokens
    temperature: float  # 0: greedy
    top_p: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature, "temperature")
        if self.limit < 1 or not 0 < self.top_p <= 1:
            raise UserError(f"limit = {self.limit}, top_p = {self.top_p}: at least 1 token, and above 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """One thought, without its delimiters."""

    text: str
    tokens: tuple[int, ...]
    closed: bool  # whether it closed itself; else it was cut at method.thought_length

    def __str__(self) -> str:
        return self.text if self.closed else f"{self.text} ... (cut)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The distribution of the next token: log-probabilities in nats, on the model's device."""

    logp: Float[Tensor, " vocab"]  # with thoughts: the log of the mean probability over them
    nothink: Float[Tensor, " vocab"]  # the same model without a thought
    thoughts: tuple[Thought, ...]
    top: tuple[tuple[str, float], ...]  # the most likely tokens with thoughts, as text, and their probabilities
    nothink_top: tuple[tuple[str, float], ...]  # those without

    def _repr_html_(self) -> str:
        """The most likely tokens with and without thoughts, and the thoughts."""
        pairs = zip(self.top, self.nothink_top, strict=True)
        rows = [(text, f"{p:.3f}", plain, f"{q:.3f}") for (text, p), (plain, q) in pairs]
        found = table(["next token, thinking", "probability", "without a thought", "probability"], rows)
        return found + (table(["thoughts"], [(str(one),) for one in self.thoughts]) if self.thoughts else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredToken:
    """A token of a given or generated text. Log-probabilities are at temperature 1, in nats."""

    at: int  # its index in the tokens of the text
    token: int
    text: str  # the text that it adds; "" inside a character
    logp: float  # with thoughts: the log of the mean probability over them
    nothink: float  # without a thought
    entropy: float  # of the prediction without a thought, in nats
    thoughts: tuple[Thought, ...]  # sampled right before it; none where the model does not think or reuses earlier ones

    @property
    def gain(self) -> float:
        """The information gain of the thoughts about this token (eq. 5, relative to the model itself)."""
        return self.logp - self.nothink


class Gains(list[ScoredToken]):
    """The scored tokens of a text. A notebook shows the text colored by gain, and the tokens of the largest gains."""

    def _repr_html_(self) -> str:
        strongest = sorted(sorted(self, key=lambda one: -abs(one.gain))[:_STRONGEST], key=lambda one: one.at)
        rows = [
            (one.at, one.text, f"{one.gain:+.3f}", f"{math.exp(one.nothink):.3f}", f"{math.exp(one.logp):.3f}",
             " | ".join(map(str, one.thoughts)))
            for one in strongest
        ]  # fmt: skip
        columns = ["position", "token", "gain, nats", "probability without a thought", "with thoughts", "thoughts"]
        return colored([one.text for one in self], [one.gain for one in self]) + table(columns, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A generated answer and the thought before it."""

    text: str  # without special tokens, up to the first stop string
    length: int  # in generated tokens, including those that stopped it
    cut_off: bool  # whether it reached the limit of tokens before anything stopped it
    thought: Thought | None


class ThinkingModel:
    """A causal LM with its tokenizer and thought template. Everywhere, `thoughts=0` means without a thought.

    `think_when="entropy > 1.0"` (or >=): the model thinks only at positions where its plain prediction of the next
    token has an entropy above 1 nat, and predicts plainly elsewhere. The same seed and text give the same thoughts.
    """

    def __init__(self, model: Any, tokenizer: Any, config: Config):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.form = thought_format(tokenizer, config.method)
        self.engine = engine(model, self.form, config, "native")
        try:
            probe_copies(model)  # rows of one context are padded, whatever model.prefix is
        except ValueError as error:
            raise UserError(f"model.path: {type(model).__name__} cannot generate with thoughts ({error})") from error
        self.ends = _end_tokens(model, tokenizer)

    @classmethod
    def load(cls, source: str | Path, overrides: dict[str, Any] | None = None) -> "ThinkingModel":
        """Load an exported folder (RUN/policy), a hub id, `embedded`, or anything else that model.path takes.

        It thinks as its forethought.json says, or with the default options. `overrides`: nested options such as
        {"method": {"thought_length": 64}}. Raises UserError.
        """
        start = merge({"model": {"path": str(source)}}, load_thinking_options(str(source)))
        config = from_dict(merge(start, overrides or {}))
        model = compute_copy(load_model(config.model, config.seed), config.model.precision)
        return cls(model, load_tokenizer(config.model), config)

    def encode(self, text: Text) -> list[int]:
        """Tokens of a text with the special tokens that begin a document. Tokens are returned unchanged."""
        tokens = context_tokens(self.tokenizer, text) if isinstance(text, str) else [int(token) for token in text]
        if not tokens:
            raise UserError("text = '': must have at least one token, since a thought is about what follows")
        self._check_tokens(tokens)
        return tokens

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        size = self.model.get_input_embeddings().weight.shape[0]
        if wrong := [token for token in tokens if not 0 <= token < size]:
            raise UserError(f"text: token {wrong[0]} is none of the model's, which are 0 to {size - 1}")

    @torch.no_grad()
    def next_token(self, text: Text, *, thoughts: int = 1, seed: int = 0) -> Prediction:
        """The distribution of the next token, averaged over sampled thoughts, and without a thought."""
        context = self.encode(text)
        sampled, _, logits = self._think_and_read(context, thoughts, seed)
        logits = logits.float().log_softmax(-1)
        logp, nothink = mixture(logits[: max(1, len(sampled))]), logits[-1]
        top, nothink_top = self._top(context, logp), self._top(context, nothink)
        return Prediction(logp=logp, nothink=nothink, thoughts=sampled, top=top, nothink_top=nothink_top)

    @torch.no_grad()
    def gains(self, text: Text, *, thoughts: int = 1, think_when: str | None = None, seed: int = 0) -> Gains:
        """Score every token of a text but the first, with thoughts right before it and without."""
        tokens, rule = self.encode(text), thinking_rule(think_when, thoughts)
        self.check_length(len(tokens), thoughts)
        nothink, entropies = self._plain(tokens, 1)
        starts = _starts(entropies.tolist(), 1, rule)
        logp, sampled = nothink.clone(), {}
        for positions, found in self._chunks(tokens, [t + 1 for t in starts], 1, thoughts, seed):
            logp[positions.at - 1] = mixture(found.evidence[..., 0].T).to(logp)
            sampled |= zip(positions.at.tolist(), self._thoughts(found), strict=True)
        columns = (tokens[1:], token_texts(self.tokenizer, tokens)[1:], logp, nothink, entropies)
        return Gains(
            ScoredToken(
                at=t,
                token=token,
                text=added,
                logp=float(with_thought),
                nothink=float(without),
                entropy=float(unsure),
                thoughts=sampled.get(t, ()),
            )
            for t, (token, added, with_thought, without, unsure) in enumerate(zip(*columns, strict=True), 1)
        )

    @torch.no_grad()
    def log_likelihood(
        self,
        text: Text,
        *,
        thoughts: int = 1,
        think_every: int = 1,
        think_when: str | None = None,
        thought_temperature: float | None = None,
        given: int = 1,
        seed: int = 0,
    ) -> float:
        """log p of a text given its first `given` tokens, in nats.

        Thoughts hold for `think_every` tokens. Then the model thinks again: at once, or at the next position where
        `think_when` holds. `thought_temperature` replaces method.temperature (0: greedy).
        """
        _check_temperature(thought_temperature)
        tokens, rule = self.encode(text), thinking_rule(think_when, thoughts)
        if think_every < 1 or not 1 <= given <= len(tokens):
            raise UserError(f"think_every must be at least 1, given 1 to {len(tokens)} (the tokens of the text)")
        horizon, total = min(think_every, max(1, len(tokens) - given)), 0.0
        self.check_length(len(tokens) + horizon - 1, thoughts)
        starts: Sequence[int] = range(0, len(tokens) - given, horizon)
        if rule is not None:
            logp, entropies = self._plain(tokens, given)
            starts = _starts(entropies.tolist(), horizon, rule)
            for start in starts:
                logp[start : start + horizon] = 0
            total = float(logp.sum())
        places = [given + t for t in starts]
        for positions, found in self._chunks(tokens, places, horizon, thoughts, seed, thought_temperature):
            inside = positions.at[:, None] + torch.arange(horizon) < len(tokens)
            total += float(mixture((found.evidence * inside[:, None].to(found.evidence.device)).sum(-1).T).sum())
        return total

    @torch.no_grad()
    def score(
        self,
        pairs: Sequence[Pair],
        *,
        thoughts: int = 1,
        think_when: str | None = None,
        thought_temperature: float | None = None,
        seed: int = 0,
        progress: Callable[[int], Any] = lambda done: None,
    ) -> list[tuple[float, bool]]:
        """log p of each continuation after thoughts at the end of its context, and whether it is the greedy one.

        `pairs`: tokens (context, continuation). Those of one context, such as the choices of a question, share their
        thoughts. Greedy: each token is the most likely of the mixture, given those before it. `progress` is called
        with the number of newly scored pairs.
        """
        if any(not context or not continuation for context, continuation in pairs):
            raise UserError("a context and its continuation must have at least one token each")
        for tokens in itertools.chain.from_iterable(pairs):
            self._check_tokens(tokens)
        rule = thinking_rule(think_when, thoughts)
        self.check_length(max((len(context) + len(more) for context, more in pairs), default=0), thoughts)
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0]))
        for batch in _by_context(order, pairs, self.config.train.rows):
            contexts = list(dict.fromkeys(tuple(pairs[i][0]) for i in batch))
            seeds = [seed] * len(contexts)
            found = self._think([list(one) for one in contexts], thoughts, seeds, thought_temperature, rule=rule)
            sampled = dict(zip(contexts, found, strict=True))
            for thinks in (True, False):
                chosen = [i for i in batch if bool(sampled[tuple(pairs[i][0])]) == thinks]
                for chunk in self._fitting(chosen, pairs, thoughts):
                    for i, score in zip(chunk, self._score([pairs[i] for i in chunk], sampled), strict=True):
                        scores[i] = score
                    progress(len(chunk))
        return scores

    def generate(
        self,
        text: Text,
        *,
        max_tokens: int = 64,
        think_every: int = 1,
        think_when: str | None = None,
        thoughts: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Iterator[ScoredToken]:
        """Generate a continuation token by token. `think_every` and `think_when` as in `log_likelihood`.

        `temperature` is that of the text (0: greedy); thoughts are sampled at method.temperature. Ends with an end
        token (which is yielded) or after `max_tokens`. Raises UserError if text, thought and new tokens exceed the
        context window.
        """
        tokens, rule = self.encode(text), thinking_rule(think_when, thoughts)
        _check_temperature(temperature, "temperature")
        if max_tokens < 1 or think_every < 1:
            raise UserError(f"max_tokens = {max_tokens}, think_every = {think_every}: must be at least 1")
        self.check_length(len(tokens) + max_tokens, thoughts)
        how = {"thoughts": thoughts, "rule": rule, "temperature": temperature, "seed": seed}
        return self._generate(tokens, (max_tokens, think_every), **how)

    @torch.no_grad()
    def answer(
        self,
        contexts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        until: Sequence[str] = (),
        thoughts: int = 1,
        think_when: str | None = None,
        thought_temperature: float | None = None,
    ) -> list[Answer]:
        """Answers to a batch of contexts, each after one thought of its own, or (thoughts=0) after none.

        The answers are decoded together. Each ends at an end token, at one of the strings `until`, or after
        sampling.limit tokens. One thought is enough: an answer sampled after it is a sample of the mixture over all
        thoughts. `thought_temperature` replaces method.temperature (0: greedy).

        Raises UserError if a context, its thought and sampling.limit tokens exceed the context window.
        """
        contexts, rule = [self.encode(context) for context in contexts], thinking_rule(think_when, thoughts)
        self.check_length(max(map(len, contexts), default=0) + sampling.limit, thoughts)
        generators = [make_generator(seed, "answer", context) for seed, context in zip(seeds, contexts, strict=True)]
        sampled = self._think(contexts, min(thoughts, 1), seeds, thought_temperature, rule=rule)
        prompts = [(self._rows(context, some) or [context])[0] for context, some in zip(contexts, sampled, strict=True)]
        stop = _stop_at(self.tokenizer, until, self.ends)
        found = generate(self.model, self.form, prompts, sampling, stop, generators)
        return [
            Answer(
                text=_before(self.tokenizer.decode(tokens, skip_special_tokens=True), until),
                length=len(tokens),
                cut_off=not stop(tokens),
                thought=some[0] if some else None,
            )
            for tokens, some in zip(found, sampled, strict=True)
        ]

    def _generate(
        self,
        tokens: list[int],
        lengths: tuple[int, int],
        *,
        thoughts: int,
        rule: Rule | None,
        temperature: float,
        seed: int,
    ) -> Iterator[ScoredToken]:
        """`generate`. Extends `tokens`."""
        limit, think_every = lengths
        batch, logits, evidence = None, torch.empty(0), torch.empty(0)
        left = 0  # tokens that the last thoughts still hold for
        if rule is not None:
            _, batch, logits = self._think_and_read(tokens, 0, seed)
        for step in range(limit):
            sampled = ()
            if left == 0:
                if batch is None or rule is None or rule(float(entropy(logits[-1:]))):
                    sampled, batch, logits = self._think_and_read(tokens, thoughts, seed)
                    left = think_every
                elif len(logits) > 1:  # the row without a thought continues
                    batch.select(torch.tensor([len(logits) - 1], device=logits.device))
                    logits = logits[-1:]
                evidence = logits.new_zeros(max(1, len(logits) - 1), dtype=torch.float32)  # of each thought, so far
            assert batch is not None
            logp = logits.float().log_softmax(-1)
            mixed = mixture(evidence[:, None] + logp[: len(evidence)]) - mixture(evidence)
            noise = torch.rand(1, generator=make_generator(seed, "write", tokens)).to(mixed.device)
            token = int(sample(self.form.decodable(mixed)[None], noise, temperature, 1.0))
            evidence = evidence + logp[: len(evidence), token]
            tokens.append(token)
            yield ScoredToken(
                at=len(tokens) - 1,
                token=token,
                text=self._added_text(tokens),
                logp=float(mixed[token]),
                nothink=float(logp[-1, token]),
                entropy=float(entropy(logits[-1:])),
                thoughts=sampled,
            )
            if token in self.ends:
                return
            left = max(0, left - 1)
            if step + 1 < limit and (left or rule is not None):
                with torch.no_grad():
                    logits = batch.step(torch.full((len(logits),), token, device=logits.device))

    @torch.no_grad()
    def _think_and_read(
        self, tokens: list[int], thoughts: int, seed: int
    ) -> tuple[tuple[Thought, ...], ReplicatedBatch, Float[Tensor, "row vocab"]]:
        """Thoughts at the end of a text, and the next-token logits after each and (last row) without a thought."""
        [sampled] = self._think([tokens], thoughts, [seed])
        rows = [*self._rows(tokens, sampled), tokens]
        return sampled, *ReplicatedBatch.read(self.model, rows, self.form.pad)

    def check_length(self, tokens: int, thoughts: int) -> None:
        """Raise UserError for a text that, with a thought in it, exceeds the context window, or thoughts below 0."""
        if thoughts < 0:
            raise UserError(f"thoughts = {thoughts}: must be at least 0")
        thought = self._overhead(thoughts)
        what = f"a text of {tokens} tokens" + (f" with {thought} for a thought" if thought else "")
        require_context(self.model.config, tokens + thought, what, "shorten the text or method.thought_length")

    def max_text_tokens(self, thoughts: int) -> int:
        """Tokens of text that fit into the context window, beside a thought unless `thoughts` is 0."""
        return context_window(self.model.config) - self._overhead(thoughts)

    def _overhead(self, thoughts: int) -> int:
        return self.form.overhead + self.config.method.thought_length if thoughts else 0

    def _think(
        self,
        contexts: Sequence[list[int]],
        thoughts: int,
        seeds: Sequence[int],
        temperature: float | None = None,
        *,
        rule: Rule | None = None,
    ) -> list[tuple[Thought, ...]]:
        """Thoughts at the end of each context (where a rule holds), at method.temperature unless another is given."""
        _check_temperature(temperature)
        self.check_length(max(map(len, contexts), default=0) + 1, thoughts)
        if thoughts < 1 or not contexts:
            return [()] * len(contexts)
        windows = [_window([*context, self.form.pad]) for context in contexts]  # an engine scores a next token
        positions = at_positions(windows, [[len(context)] for context in contexts], 1)
        if rule is not None:
            values = no_think_entropy(self.model, positions, self._tokens_at_once()).tolist()
            chosen = [i for i, value in enumerate(values) if rule(value)]
            some = self._think([contexts[i] for i in chosen], thoughts, [seeds[i] for i in chosen], temperature)
            told = dict(zip(chosen, some, strict=True))
            return [told.get(i, ()) for i in range(len(contexts))]
        return self._thoughts(self._sample(positions, thoughts, seeds, temperature))

    def _sample(
        self, positions: Positions, thoughts: int, seeds: Sequence[int], temperature: float | None = None
    ) -> Thoughts:
        pairs, config = zip(seeds, positions.contexts(), strict=True), self.config
        generators = [make_generator(seed, "think", context) for seed, context in pairs]
        sampler = self.engine
        if temperature is not None:
            rows, shared = config.train.rows, config.model.prefix == "shared"
            backend = EagerBackend(self.model, rows, prepack=config.model.decoding != "eager")
            backend.draw = partial(_draw_at, temperature)
            sampler = NativeEngine(self.model, self.form, config.method, rows, shared, backend=backend)
        return sampler.sample(positions, draw_noise((thoughts, config.method.thought_length), generators))

    def _chunks(
        self,
        tokens: list[int],
        starts: Sequence[int],
        horizon: int,
        thoughts: int,
        seed: int,
        temperature: float | None = None,
    ) -> Iterator[tuple[Positions, Thoughts]]:
        """Positions with the thoughts there and the `horizon` tokens that follow. The text is padded at its end."""
        window = _window([*tokens, *[self.form.pad] * (horizon - 1)])
        size = max(1, self.config.train.rows // max(1, thoughts))
        for start in range(0, len(starts), size):
            positions = at_positions([window], [starts[start : start + size]], horizon)
            yield positions, self._sample(positions, thoughts, [seed] * len(positions), temperature)

    def _plain(self, tokens: list[int], first: int) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
        """log p of each token from `first` on without a thought, and the entropy there; one forward pass."""
        positions = at_positions([_window(tokens)], [range(first, len(tokens))], 1)
        if not len(positions):
            return torch.zeros(0), torch.zeros(0)
        logp, _, entropies = no_think_scores(self.model, positions, self._tokens_at_once())
        return logp[:, 0].cpu(), entropies

    def _tokens_at_once(self) -> int:
        return chunk_tokens(self.model, self.config.update.tokens_per_chunk)

    def _thoughts(self, found: Thoughts) -> list[tuple[Thought, ...]]:
        inside = thought_tokens(found, self.form)
        columns = zip(inside, decode_thoughts(self.tokenizer, inside), found.closed.tolist(), strict=True)
        return [
            tuple(
                Thought(text=text, tokens=tuple(tokens), closed=closed)
                for tokens, text, closed in zip(*group, strict=True)
            )
            for group in columns
        ]

    def _rows(self, context: list[int], sampled: Sequence[Thought]) -> list[list[int]]:
        """What the model reads before it predicts: a row for each thought."""
        return [[*self.form.prompt_tokens(context), *thought.tokens, *self.form.bridge(context)] for thought in sampled]

    def _fitting(self, order: Sequence[int], pairs: Sequence[Pair], thoughts: int) -> Iterator[list[int]]:
        """Chunks of pairs whose rows fit into one forward pass."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        longest = max((len(pairs[i][1]) for i in order), default=1)
        rows = min(self.config.train.rows, _MAX_LOGITS // (longest * vocabulary))
        size = max(1, rows // max(1, thoughts))
        yield from (list(order[start : start + size]) for start in range(0, len(order), size))

    def _score(
        self, pairs: Sequence[Pair], sampled: Mapping[tuple[int, ...], tuple[Thought, ...]]
    ) -> list[tuple[float, bool]]:
        """`score` in one forward pass; pairs of one context are adjacent."""
        contexts = list(dict.fromkeys(tuple(context) for context, _ in pairs))
        thinks = bool(sampled[contexts[0]])
        form = self.form if thinks else replace(self.form, before=(), after=(), open=(), close=(), repeat=0)
        tokens = {context: [thought.tokens for thought in sampled[context]] or [()] for context in contexts}
        suffixes: list[list[list[int]]] = [[] for _ in contexts]
        for context, continuation in pairs:
            suffixes[contexts.index(tuple(context))] += [
                [*form.after, *form.open, *thought, *form.bridge(context), *continuation[:-1]]
                for thought in tokens[tuple(context)]
            ]
        windows = [_window([*context, form.pad]) for context in contexts]
        positions = at_positions(windows, [[len(context)] for context in contexts], 1)
        keep = max(len(continuation) for _, continuation in pairs)
        shared = thinks and self.config.model.prefix == "shared"
        logits = suffix_logits(self.model, positions, form, suffixes, keep, shared)
        grouped = logits.unflatten(0, (len(pairs), -1))  # (pair, thought, kept, vocab)
        return [
            _mixture_score(some[:, -len(continuation) :].float().log_softmax(-1), continuation)
            for some, (_, continuation) in zip(grouped, pairs, strict=True)
        ]

    def _top(self, context: list[int], logp: Float[Tensor, " vocab"]) -> tuple[tuple[str, float], ...]:
        best = logp.topk(min(5, len(logp)))
        probabilities = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
        return tuple((self._added_text([*context, token]), probability) for token, probability in probabilities)

    def _added_text(self, tokens: Sequence[int]) -> str:
        """The text that the last token adds; "" while a character is incomplete."""
        text = token_texts(self.tokenizer, tokens[-_TAIL:])[-1]
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text


def _check_temperature(temperature: float | None, name: str = "thought_temperature") -> None:
    if temperature is not None and not 0 <= temperature < math.inf:
        raise UserError(f"{name} = {temperature}: must be at least 0 and finite")


def thinking_rule(think_when: str | None, thoughts: int) -> Rule | None:
    """Where to think, from "entropy > NUMBER" or "entropy >= NUMBER"; None: everywhere. Raises UserError for others."""
    found = None if think_when is None else _CONDITION.fullmatch(think_when)
    if think_when is not None and found is None:
        raise UserError(f'think_when = {think_when!r}: must be "entropy > NUMBER" or "entropy >= NUMBER", in nats')
    if thoughts == 0:
        return lambda value: False
    if found is None:
        return None
    above, bound = operator.ge if found[1] == ">=" else operator.gt, float(found[2])
    return lambda value: above(value, bound)


def _starts(entropies: Sequence[float], horizon: int, rule: Rule | None) -> list[int]:
    """Where thoughts begin that hold for `horizon` tokens each: the first position left where the rule holds."""
    starts, t = [], 0
    while t < len(entropies):
        thinks = rule is None or rule(entropies[t])
        starts += [t] if thinks else []
        t += horizon if thinks else 1
    return starts


def mixture(logp: Float[Tensor, "thought ..."]) -> Float[Tensor, "..."]:
    """log of the mean probability over thoughts: log 1/k sum_i exp logp_i."""
    return logp.logsumexp(dim=0) - math.log(len(logp))


def _mixture_score(logp: Float[Tensor, "thought token vocab"], tokens: Sequence[int]) -> tuple[float, bool]:
    """log p of tokens under the mixture, and whether each is its most likely token given those before."""
    target = torch.tensor(tokens, device=logp.device)
    target_logp = logp.gather(-1, target.expand(len(logp), -1)[..., None]).squeeze(-1)  # (thought, token)
    before = target_logp.cumsum(dim=-1) - target_logp
    greedy = mixture(before[..., None] + logp).argmax(dim=-1)
    return float(mixture(target_logp.sum(dim=-1))), bool((greedy == target).all())


def _by_context(order: Sequence[int], pairs: Sequence[Pair], contexts: int) -> Iterator[list[int]]:
    """Batches of `contexts` contexts with all their pairs, from an order in which equal contexts are adjacent."""
    groups = [list(some) for _, some in itertools.groupby(order, key=lambda i: tuple(pairs[i][0]))]
    for start in range(0, len(groups), contexts):
        yield [i for group in groups[start : start + contexts] for i in group]


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: those of the generation config, and the tokenizer's EOS."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if token is not None)


def _stop_at(tokenizer: Any, strings: Sequence[str], ends: frozenset[int]) -> Stop:
    """Stop a row at an end token or when its last tokens contain one of the strings."""
    tail = max(map(len, strings), default=0) + 8  # in tokens; one may be less than a character

    def stop(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(tokens[-tail:]) if strings else ""
        return tokens[-1] in ends or any(string in text for string in strings)

    return stop


def _before(text: str, strings: Sequence[str]) -> str:
    """The text up to the first of the strings in it."""
    return text[: min((text.find(string) for string in strings if string in text), default=len(text))]


def _draw_at(temperature: float, logits: Tensor, noise: Tensor, options: Method) -> tuple[Tensor, Tensor]:
    """`decoder.sample_with_logp` at another temperature, such as 0; log p, which nobody uses, is of the options'."""
    token = sample(logits, noise, temperature, options.top_p)
    return token, log_probabilities(logits, token, options.temperature)


def _window(tokens: list[int]) -> Window:
    return Window(document="", start=0, tokens=tokens, marks={})


@torch.no_grad()
def generate(
    model: Any,
    form: ThoughtFormat,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Stop,
    generators: Sequence[torch.Generator],
) -> list[list[int]]:
    """The tokens that follow each prompt, with the one that stopped it; at least one each.

    Prompt i draws from generators[i] alone, so its text does not depend on the other prompts (up to the rounding of a
    row that is padded to another width). Ids that `form` cannot decode are never drawn.
    """
    if not prompts:
        return []
    noise = torch.stack([torch.rand(sampling.limit, generator=one) for one in generators]).to(model.device)
    batch, logits = ReplicatedBatch.read(model, prompts, pad=0)
    texts: list[list[int]] = [[] for _ in prompts]
    rows, running = list(range(len(prompts))), [True] * len(prompts)  # the rows in the batch, and which continue
    for step in range(sampling.limit):
        drawn = sample(form.decodable(logits), noise[rows, step], sampling.temperature, sampling.top_p)
        for i, (row, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
            if running[i]:
                texts[row].append(token)
                running[i] = not stop(texts[row])
        if not any(running) or step + 1 == sampling.limit:
            break
        if sum(running) < COMPACT * len(rows):
            kept = [i for i, runs in enumerate(running) if runs]
            rows, running = [rows[i] for i in kept], [True] * len(kept)
            drawn = drawn[kept]
            batch.select(torch.tensor(kept, device=model.device))
        logits = batch.step(drawn)
    return texts
