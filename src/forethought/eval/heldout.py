"""Held-out text: what a model's own thoughts gain, at the same seeded positions for every model.

Groups of positions: `all` (drawn uniformly); one for each kind of mark in the corpus, such as `answer`; and, where the
corpus tells them apart, the positions of `all` in each domain (`domain:books`) and language (`language:pl`).
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from forethought.algo.metrics import decode_thoughts, leakage
from forethought.config import Config, UserError
from forethought.config.registry import CONTROLS, THINKING_SHARES
from forethought.data.corpus import Window, spread_windows
from forethought.data.positions import Positions, ThoughtFormat, at_positions, make_generator, uniform
from forethought.data.worlds import load_world
from forethought.eval.intervals import Estimate, Ratio, estimate, resample
from forethought.models.logprobs import chunk_tokens, no_think_logp, no_think_scores
from forethought.rollout import Engine, draw_noise, thought_tokens
from forethought.run import distributed

_SHARES = ("accuracy_think", "accuracy_nothink", "closed", "leakage", "truth")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is evaluated: a model, the engine that samples its thoughts, and the format of a thought."""

    model: Any
    engine: Engine
    form: ThoughtFormat
    tokenizer: Any
    config: Config
    teacher: Any | None = None  # the EMA teacher of the run that made the model, where there is one
    as_model: Callable[[Any], AbstractContextManager[Any]] = nullcontext  # makes the teacher a model that can be called


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """One entry per position, in the order of the held-out documents; log-probabilities of the true token in nats.

    A field that is None was not measured.
    """

    document: list[int]  # index of the held-out document
    at: list[int]  # index of the true token in it
    window: list[int]  # index of the window
    text: list[int]  # checksum of the window's tokens
    nothink: list[float]  # log p without a thought
    nothink_hit: list[bool]  # whether the true token was the argmax
    entropy: list[float]  # of the distribution without a thought, nats
    think: list[float]  # log p after a thought of the model's own, mean over the sampled thoughts
    think_hit: list[float]  # share of thoughts after which the true token was the argmax
    length: list[float]  # tokens, mean over thoughts
    closed: list[float]  # share of thoughts that closed themselves
    marginal: list[float]  # log of the mean over thoughts of p
    teacher: list[float] | None = None  # log p without a thought by the EMA teacher
    leakage: list[float | None]  # share of thoughts that contain the target's text; None: it has none
    right: list[float] | None = None  # correct statements in a thought, mean over thoughts
    stated: list[float] | None = None  # checkable statements in a thought, mean over thoughts
    empty: list[float] | None = None  # log p after an empty thought
    shuffled: list[float] | None = None  # log p after another position's thoughts, mean
    random: list[float] | None = None  # log p after thoughts of random tokens, mean
    generic: list[float] | None = None  # log p after one thought that is the same everywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A group of positions with the thoughts sampled there."""

    positions: Positions
    thoughts: list[list[list[int]]]  # without closing delimiters
    records: Records


Progress = Callable[[int, int], None]
T = TypeVar("T")


def held_out(config: Config, tokenizer: Any) -> list[Window]:
    """The windows of evaluate.path, from as many documents as possible; the same for every seed of a run."""
    options = dataclasses.replace(config.corpus, path=config.evaluate.path)
    return spread_windows(options, tokenizer, 0, config.evaluate.documents, "evaluate.path")


def measure(subject: Subject, windows: Sequence[Window], progress: Progress) -> dict[str, Records]:
    """Sample the model's thoughts at every chosen position; one `Records` per group."""
    measured = sample_groups(subject, windows, progress)
    return with_domains({name: group.records for name, group in measured.items()}, windows)


def sample_groups(subject: Subject, windows: Sequence[Window], progress: Progress) -> dict[str, Measured]:
    """The groups of positions, with their thoughts and records; chunks are distributed over the ranks."""
    config = subject.config
    groups = _group_positions(windows, config)
    total, done = sum(len(group) for chosen in groups.values() for group in chosen), 0
    numbers, texts = _numbers(windows), _checksums(windows)
    result = {}
    for name, chosen in groups.items():
        positions = at_positions(windows, chosen, config.method.horizon)
        found = over_ranks(
            positions.chunks(max(1, config.train.rows // config.evaluate.thoughts)),
            lambda chunk, start, name=name, before=done: _measure_chunk(subject, chunk, name, before + start),
            lambda now, before=done: progress(before + now, total),
        )
        done += len(positions)
        columns = {field: [value for part in found for value in part[field]] for field in found[0]}
        owners = positions.window.tolist()
        at = [windows[owner].start + t for owner, t in zip(owners, positions.at.tolist(), strict=True)]
        text, document = [texts[owner] for owner in owners], [numbers[owner] for owner in owners]
        thoughts = columns.pop("thoughts")
        records = Records(document=document, at=at, window=owners, text=text, **columns)
        result[name] = Measured(positions=positions, thoughts=thoughts, records=records)
    return result


def over_ranks(
    chunks: Iterable[Positions], work: Callable[[Positions, int], T], progress: Callable[[int], None]
) -> list[T]:
    """The work on every chunk, in order, on every rank; each does its share. `work` is told the positions before it."""
    found, done = {}, 0
    for turn, chunk in enumerate(chunks):
        if turn % distributed.world_size() == distributed.rank():
            found[turn] = work(chunk, done)
        done += len(chunk)
        progress(done)
    found = {turn: one for some in distributed.all_gather(found) for turn, one in some.items()}
    return [found[turn] for turn in sorted(found)]


def with_domains(records: dict[str, Records], windows: Sequence[Window]) -> dict[str, Records]:
    """The groups and, out of `all`, one for each domain and each language where there are at least two of them."""
    whole, result, numbers = records["all"], dict(records), _numbers(windows)
    for kind in ("domain", "language"):
        names = {number: getattr(window, kind) for number, window in zip(numbers, windows, strict=True)}
        known = sorted({name for name in names.values() if name is not None})
        for name in known if len(known) > 1 else []:
            picks = [i for i, number in enumerate(whole.document) if names[number] == name]
            group = f"{kind}:{name.replace('/', '-')}"
            while group in result:  # a/b beside a-b
                group += "-"
            if picks:
                result[group] = _pick(whole, picks)
    return result


def clusters(records: Records) -> list[int]:
    """What the bootstrap draws: documents. Where there is only one, such as a book, its windows stand in."""
    return records.window if len(set(records.document)) == 1 else records.document


def check_text(records: dict[str, Records], windows: Sequence[Window], path: str, file: Path) -> None:
    """Raise UserError where the records of a file are not of these windows of `path`."""
    texts = dict(enumerate(_checksums(windows)))
    if any([texts.get(window) for window in one.window] != one.text for one in records.values()):
        raise UserError(f"evaluate.path = {path!r}: is not the held-out text of {file}; put that text back to go on")


def _checksums(windows: Sequence[Window]) -> list[int]:
    return [zlib.crc32(str(window.tokens).encode()) for window in windows]


def _pick(records: Records, picks: list[int]) -> Records:
    columns = {field.name: getattr(records, field.name) for field in dataclasses.fields(Records)}
    return Records(**{name: column and [column[i] for i in picks] for name, column in columns.items()})


def _numbers(windows: Sequence[Window]) -> list[int]:
    """For each window the index of its document, in the order of first appearance."""
    seen: dict[str, int] = {}
    return [seen.setdefault(window.document, len(seen)) for window in windows]


def _group_positions(windows: Sequence[Window], config: Config) -> dict[str, list[list[int]]]:
    """Token indices of the positions, by group and window."""
    last = [len(window.tokens) - config.method.horizon for window in windows]
    groups = {
        "all": [
            sorted(uniform(window, config.evaluate.positions, config.method, make_generator(0, "evaluate", i)))
            for i, window in enumerate(windows)
        ]
    }
    for name in sorted({name for window in windows for name in window.marks}):
        marks = [window.marks.get(name, ()) for window in windows]
        groups[name] = [[t for t in some if 1 <= t <= end] for some, end in zip(marks, last, strict=True)]
    return {name: chosen for name, chosen in groups.items() if any(chosen)}


@torch.no_grad()
def _measure_chunk(subject: Subject, chunk: Positions, name: str, done: int) -> dict[str, list[Any]]:
    """The thoughts at positions of the group `name`, of which `done` come before them, and the fields of `Records`."""
    config, tokenizer = subject.config, subject.tokenizer
    shape = (config.evaluate.thoughts, config.method.thought_length)
    noise = draw_noise(shape, [make_generator(0, "evaluate", name, done + i) for i in range(len(chunk))])
    thoughts = subject.engine.sample(chunk, noise)
    at_once = chunk_tokens(subject.model, config.update.tokens_per_chunk)
    nothink, hit, entropy = no_think_scores(subject.model, chunk, at_once)
    evidence, tokens = thoughts.evidence[..., 0], thought_tokens(thoughts, subject.form)
    said = decode_thoughts(tokenizer, tokens)
    columns = {
        "thoughts": tokens,
        "nothink": nothink[:, 0].tolist(),
        "nothink_hit": hit[:, 0].tolist(),
        "entropy": entropy.tolist(),
        "think": evidence.mean(dim=1).tolist(),
        "think_hit": thoughts.hit[..., 0].float().mean(dim=1).tolist(),
        "length": thoughts.lengths.float().mean(dim=1).tolist(),
        "closed": thoughts.closed.float().mean(dim=1).tolist(),
        "marginal": (evidence.logsumexp(dim=1) - math.log(evidence.shape[1])).tolist(),
        "leakage": leakage(tokenizer, chunk.targets()[:, 0].tolist(), said),
    }
    if subject.teacher is not None:
        with subject.as_model(subject.teacher) as teacher:
            columns["teacher"] = no_think_logp(teacher, chunk, at_once)[0][:, 0].tolist()
    if truth := checker(config.evaluate.path):
        columns["right"], columns["stated"] = statements(truth, tokenizer, chunk, said)
    return columns


def checker(path: str) -> Callable[[str, str], tuple[int, int]] | None:
    """What checks statements: the `truth` of the embedded world that a corpus path names; None for other corpora."""
    kind, _, rest = path.partition(":")
    return load_world(rest.partition("/")[0]).truth if kind == "world" else None


def statements(
    truth: Callable[[str, str], tuple[int, int]], tokenizer: Any, positions: Positions, texts: list[list[str]]
) -> tuple[list[float], list[float]]:
    """Correct and checkable statements in a thought, mean over each position's thoughts.

    They are checked against the whole window, including what follows the position. Of a document cut into several
    windows, only the first is text that a world can parse.
    """
    known = [
        "" if window.start else tokenizer.decode(window.tokens, skip_special_tokens=True)
        for window in positions.windows
    ]
    owned = zip(positions.window.tolist(), texts, strict=True)
    counts = np.array([[truth(known[owner], thought) for thought in group] for owner, group in owned])
    right, stated = counts.mean(axis=1).T.tolist()  # of (batch, group, 2)
    return right, stated


def summarize(records: dict[str, Records], base: dict[str, Records]) -> dict[str, float]:
    """Flat figures `GROUP/METRIC` with `/low` and `/high`, the 95 % bootstrap interval over documents.

    `base` holds the untouched model's records at the same positions; pass the records themselves for the base.
    """
    return figures(drawn_together([records], [base]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A group of positions of several runs: where it was measured, and each metric with its value in every resample."""

    first: Records
    estimates: dict[str, Estimate]


def drawn_together(seeds: Sequence[dict[str, Records]], bases: Sequence[dict[str, Records]]) -> dict[str, Drawn]:
    """Runs that differ in their seed, for `figures` and `differences`: the groups of positions that all of them have.

    Each seed has its own base (the same one again where all began with the same weights). See `intervals`.
    """
    return {
        name: Drawn(first=first, estimates=_estimates([one[name] for one in seeds], [one[name] for one in bases]))
        for name, first in seeds[0].items()
        if all(name in one for one in seeds)
    }


def figures(drawn: Mapping[str, Drawn]) -> dict[str, float]:
    """Means over seeds, intervals over seeds and documents, and how much was measured."""
    found: dict[str, float] = {}
    for name, one in drawn.items():
        document, windows = one.first.document, clusters(one.first)
        found |= _flat(name, one.estimates)
        found |= {f"{name}/positions": len(document), f"{name}/documents": len(set(document))}
        found |= {f"{name}/windows": len(set(windows))} if windows != document else {}
    return found


def differences(mine: Mapping[str, Drawn], theirs: Mapping[str, Drawn]) -> dict[str, float]:
    """Figures of one arm minus those of another at the same positions, with the interval of the difference.

    Means over seeds: the n-th of mine against the n-th of theirs. The same documents are drawn for both, so what makes
    a document hard for both does not widen the interval. Groups and metrics are those that both sides have. Raises
    UserError for arms that were measured at different positions.
    """
    found: dict[str, float] = {}
    for name in [name for name in mine if name in theirs]:
        left, right = mine[name], theirs[name]
        _check_same(left.first, [right.first])
        shared = [metric for metric in left.estimates if metric in right.estimates]
        found |= _flat(name, {metric: left.estimates[metric] - right.estimates[metric] for metric in shared})
    return found


def _estimates(mine: Sequence[Records], bases: Sequence[Records]) -> dict[str, Estimate]:
    """Every metric that all seeds have."""
    _check_same(mine[0], [*mine, *bases])
    drawn = resample(clusters(mine[0]), len(mine))
    tables = [_ratios(one, base) for one, base in zip(mine, bases, strict=True)]
    shared = [metric for metric in tables[0] if all(metric in table for table in tables)]
    found = {
        metric: estimate([table[metric] for table in tables], drawn, (0.0, 1.0) if metric in _SHARES else None)
        for metric in shared
    }
    return {metric: one for metric, one in found.items() if one is not None}


def _check_same(first: Records, others: Sequence[Records]) -> None:
    for one in others:
        if (one.document, one.at, one.text) != (first.document, first.at, first.text):
            what = "the held-out text or options of evaluate have changed"
            raise UserError(f"records must be of the same positions of the same text; {what}")


def _flat(name: str, estimates: Mapping[str, Estimate]) -> dict[str, float]:
    found = {}
    for metric, one in estimates.items():
        found[f"{name}/{metric}"] = one.value
        if interval := one.interval():
            found[f"{name}/{metric}/low"], found[f"{name}/{metric}/high"] = interval
    return found


def _ratios(mine: Records, base: Records) -> dict[str, Ratio]:
    """Each metric's numerators and denominators (docs/metrics.md)."""
    think, nothink = np.array(mine.think), np.array(mine.nothink)
    gained, plain = think - np.array(base.nothink), nothink - np.array(base.nothink)
    means = {"ce_think": -think, "ce_nothink": -nothink, "marginal": -np.array(mine.marginal)}
    means |= {"gain_self": think - nothink, "gain_over_base": gained, "plain_gain_over_base": plain, "drift": -plain}
    means |= {
        "accuracy_think": np.array(mine.think_hit),
        "accuracy_nothink": np.array(mine.nothink_hit, dtype=float),
        "thought_length": np.array(mine.length),
        "closed": np.array(mine.closed),
    }
    if mine.teacher is not None:
        means["gain_over_teacher"] = think - np.array(mine.teacher)
    controls = {name: np.array(values) for name in CONTROLS if (values := getattr(mine, name)) is not None}
    for name, values in controls.items():
        means |= {f"ce_{name}": -values, f"gain_{name}": values - nothink, f"gain_over_{name}": think - values}
    if mine.stated is not None:
        means["checkable"] = np.array(mine.stated)
    ratios = {metric: (values, np.ones(len(think))) for metric, values in means.items()}
    if "shuffled" in controls:
        ratios["kept_shuffled"] = (controls["shuffled"] - nothink, think - nothink)
    share = np.array(mine.leakage, dtype=float)
    ratios["leakage"] = (np.nan_to_num(share), np.isfinite(share).astype(float))
    if mine.right is not None and mine.stated is not None:
        ratios["truth"] = (np.array(mine.right), np.array(mine.stated))
    return ratios | _top(np.array(mine.entropy), think - nothink)


def _top(entropy: np.ndarray, gain: np.ndarray) -> dict[str, Ratio]:
    """The mean gain at exactly ceil(share * n) positions, those of highest entropy; of equal ones, the first."""
    order, found = np.argsort(-entropy, kind="stable"), {}
    for share, metric in THINKING_SHARES.items():
        chosen = np.zeros(len(gain))
        chosen[order[: math.ceil(share * len(gain) / 100)]] = 1
        found[metric] = (chosen * gain, chosen)
    return found
