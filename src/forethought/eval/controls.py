"""Controls: the same score after a thought that does not belong there. A gain that survives shuffling is not reasoning.

empty      the opening delimiter, immediately followed by the closing one
shuffled   another position's thought
random     as many tokens as the thought, drawn uniformly from the vocabulary
generic    one thought for all positions: the model's own that gains most on average on training text
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forethought.config import Notice, UserError
from forethought.data.corpus import Window, spread_windows
from forethought.data.positions import Positions, ThoughtFormat, at_positions, make_generator, uniform
from forethought.eval.heldout import Measured, Records, Subject, over_ranks, sample_groups, with_domains
from forethought.models.logprobs import thought_evidence
from forethought.rollout import draw_noise, thought_tokens

Progress = Callable[[str, int, int], None]
"""Name of the phase, positions done, positions in total."""
Groups = Sequence[Sequence[Sequence[int]]]
"""The tokens of several thoughts at each position."""
CANDIDATES, JUDGES = 16, 64
"""Thoughts among which the generic one is chosen, and the positions of training text at which they are compared."""


def measure(
    subject: Subject, windows: Sequence[Window], progress: Progress, generic: Sequence[int] | None = None
) -> dict[str, Records]:
    """What `heldout.measure` measures, and the controls at the same positions; of `generic`, the thought's tokens."""
    measured = sample_groups(subject, windows, lambda done, total: progress("evaluating", done, total))
    total, before = sum(len(group.thoughts) for group in measured.values()), 0
    records = {}
    for name, group in measured.items():
        given = control_thoughts(subject, name, group, generic)
        joined = [[one for some in groups for one in some] for groups in zip(*given.values(), strict=True)]
        logp = _target_logp(
            subject, group.positions, joined, lambda done, before=before: progress("controls", before + done, total)
        )
        parts = zip(given, logp.split([len(some[0]) for some in given.values()], dim=1), strict=True)
        scores = {control: part.mean(dim=1).tolist() for control, part in parts}
        records[name] = dataclasses.replace(group.records, **scores)
        before += len(group.thoughts)
    return with_domains(records, windows)


def derangement(documents: Sequence[int], generator: torch.Generator) -> list[int]:
    """A random permutation without fixed points that takes as few positions as possible from their own document.

    Positions are ordered by document, the largest first, and shifted by the size of the largest: that leaves every
    document, unless the largest holds more than half of the positions. Raises ValueError for a single position.
    """
    size = len(documents)
    if size < 2:
        raise ValueError(f"shuffling thoughts takes at least 2 positions, got {size}")
    members: dict[int, list[int]] = {}
    for i in torch.randperm(size, generator=generator).tolist():
        members.setdefault(documents[i], []).append(i)
    order = sorted(members.values(), key=len, reverse=True)
    row = [i for group in order for i in group]
    shift = min(len(order[0]), size // 2)
    source = [0] * size
    for i, position in enumerate(row):
        source[position] = row[(i + shift) % size]
    return source


def ordinary_tokens(tokenizer: Any, form: ThoughtFormat) -> list[int]:
    """The vocabulary without special tokens and without the delimiters' tokens."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return sorted({*tokenizer.get_vocab().values()} - special - {*tokenizer.all_special_ids, *form.open, *form.close})


def random_thoughts(thoughts: list[list[list[int]]], vocabulary: Sequence[int], name: str) -> list[list[list[int]]]:
    """Thoughts of the same lengths, of uniformly drawn tokens; each position draws from a generator of its own."""
    drawn: list[list[list[int]]] = []
    for i, group in enumerate(thoughts):
        generator = make_generator(0, "random", name, i)
        picks = [torch.randint(len(vocabulary), (len(thought),), generator=generator).tolist() for thought in group]
        drawn.append([[vocabulary[pick] for pick in some] for some in picks])
    return drawn


def control_thoughts(subject: Subject, name: str, group: Measured, generic: Sequence[int] | None) -> dict[str, Groups]:
    """The thoughts of each control, by position; a single position is not shuffled."""
    thoughts = group.thoughts
    found: dict[str, Groups] = {
        "empty": [[[]] for _ in thoughts],
        "random": random_thoughts(thoughts, ordinary_tokens(subject.tokenizer, subject.form), name),
    }
    if len(thoughts) > 1:
        source = derangement(group.records.document, make_generator(0, "shuffled", name))
        found["shuffled"] = [thoughts[i] for i in source]
    return found if generic is None else found | {"generic": [[generic] for _ in thoughts]}


def generic_thought(subject: Subject, held_out: Sequence[Window], progress: Progress) -> list[int] | None:
    """The thought that gains most where it is the same at every position, as tokens; chosen on training text.

    The text is corpus.path, without documents that are held out. Up to `CANDIDATES` different thoughts of the model's
    own are compared by their mean log p of the true token at up to `JUDGES` other positions, each of another window;
    log p without a thought is the same for all of them. None without such text, or where the model thinks nothing.
    """
    config, count = subject.config, CANDIDATES + JUDGES
    known = {os.path.realpath(window.document) for window in held_out}
    try:
        found = spread_windows(config.corpus, subject.tokenizer, 0, count + len(known))
    except UserError as error:
        warnings.warn(f"the control `generic` is left out: {error}", Notice, stacklevel=2)
        return None
    return best_thought(
        subject, [one for one in found if os.path.realpath(one.document) not in known][:count], progress
    )


@torch.no_grad()
def best_thought(subject: Subject, windows: Sequence[Window], progress: Progress) -> list[int] | None:
    """The choice of `generic_thought`: candidates are sampled in the first fifth of the windows, judged in the rest."""
    config, first = subject.config, -(-len(windows) * CANDIDATES // (CANDIDATES + JUDGES))
    chosen = [uniform(one, 1, config.method, make_generator(0, "generic", i)) for i, one in enumerate(windows)]
    asked, judges = (
        at_positions(windows[part], chosen[part], config.method.horizon) for part in (slice(first), slice(first, None))
    )
    if not len(judges):
        return None
    shape, total = (config.evaluate.thoughts, config.method.thought_length), len(asked) + len(judges)

    def sample(chunk: Positions, start: int) -> list[list[list[int]]]:
        noise = draw_noise(shape, [make_generator(0, "generic thought", start + i) for i in range(len(chunk))])
        return thought_tokens(subject.engine.sample(chunk, noise), subject.form)

    def tell(done: int) -> None:
        progress("choosing a generic thought", done, total)

    chunks = asked.chunks(max(1, config.train.rows // shape[0]))
    groups = [group for some in over_ranks(chunks, sample, tell) for group in some]
    different = dict.fromkeys(tuple(thought) for turn in zip(*groups, strict=True) for thought in turn if thought)
    candidates = list(map(list, different))[:CANDIDATES]
    if not candidates:
        return None
    logp = _target_logp(subject, judges, [candidates] * len(judges), lambda done: tell(len(asked) + done))
    return candidates[int(logp.mean(dim=0).argmax())]


@torch.no_grad()
def _target_logp(
    subject: Subject, positions: Positions, given: Groups, progress: Callable[[int], None]
) -> Float[Tensor, "batch group"]:
    """log p of the true token after each given thought, as many at each position; nats, on the CPU."""
    model, config = subject.model, subject.config

    def score(chunk: Positions, start: int) -> Float[Tensor, "part group"]:
        here = given[start : start + len(chunk)]
        logp = thought_evidence(model, chunk, subject.form, here, config.model.prefix == "shared")
        targets = chunk.targets()[:, :1, None].to(logp.device)
        return logp.gather(-1, targets.expand(-1, logp.shape[1], 1)).squeeze(-1).cpu()  # (part, group)

    chunks = positions.chunks(max(1, config.train.rows // len(given[0])))
    return torch.cat(over_ranks(chunks, score, progress))
