"""Controls: the same score after a thought that does not belong there. A gain that survives shuffling is not reasoning.

empty      the opening delimiter, immediately followed by the closing one
shuffled   another position's thought
random     as many tokens as the thought, drawn uniformly from the vocabulary
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from forethought.data.corpus import Window
from forethought.data.positions import ThoughtFormat, make_generator
from forethought.eval.heldout import Measured, Records, Subject, sample_groups, with_domains
from forethought.models.logprobs import thought_evidence

Progress = Callable[[str, int, int], None]
"""Name of the phase, positions done, positions in total."""


def measure(subject: Subject, windows: Sequence[Window], progress: Progress) -> dict[str, Records]:
    """What `heldout.measure` measures, and the controls at the same positions."""
    measured = sample_groups(subject, windows, lambda done, total: progress("evaluating", done, total))
    total, before = sum(len(group.thoughts) for group in measured.values()), 0
    records = {}
    for name, group in measured.items():
        scores = _scores(subject, name, group, lambda done, before=before: progress("controls", before + done, total))
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


@torch.no_grad()
def _scores(subject: Subject, name: str, group: Measured, progress: Callable[[int], None]) -> dict[str, list[float]]:
    """log p of the true token after each control, mean over thoughts; a single position is not shuffled."""
    thoughts, config = group.thoughts, subject.config
    controls = {
        "empty": [[[]] for _ in thoughts],
        "random": random_thoughts(thoughts, ordinary_tokens(subject.tokenizer, subject.form), name),
    }
    if len(thoughts) > 1:
        source = derangement(group.records.document, make_generator(0, "shuffled", name))
        controls["shuffled"] = [thoughts[i] for i in source]
    scores: dict[str, list[float]] = {control: [] for control in controls}
    given = [[one for group in some for one in group] for some in zip(*controls.values(), strict=True)]
    done, sizes = 0, [len(some[0]) for some in controls.values()]
    for chunk in group.positions.chunks(max(1, config.train.rollout_batch // sum(sizes))):
        here = given[done : done + len(chunk)]
        logp = thought_evidence(subject.model, chunk, subject.form, here, config.model.prefix == "shared")
        targets = chunk.targets()[:, 0].to(subject.model.device)
        picked = logp.gather(-1, targets[:, None, None].expand(-1, logp.shape[1], 1)).squeeze(-1)  # (batch, group)
        for control, part in zip(controls, picked.split(sizes, dim=1), strict=True):
            scores[control] += part.mean(dim=1).tolist()
        done += len(chunk)
        progress(done)
    return scores
