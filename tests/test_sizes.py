"""Sizes that a run chooses itself: what fits a GPU, fixed ones on a CPU, the same on all ranks and after a resume."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from forethought.algo.cpt import CPT
from forethought.config import Config, RunError, from_dict
from forethought.flops import SavedBytes
from forethought.memory import Device, Setup, memory, sized
from forethought.models.loading import load_model
from forethought.models.logprobs import chunk_tokens
from forethought.run.folder import RunLog, read_lines
from forethought.run.trackers import Callbacks
from forethought.tools.plan import Options, as_dict, plan
from forethought.trainer import resume, train
from helpers.moments import after_forwards
from helpers.plans import TINY, config
from helpers.runs import assert_same_run, cut, drift, options


class Notes(Callbacks):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def automatic(rows: int = 0, tokens: int = 0, **sections: Any) -> Config:
    """32 windows of one position with eight thoughts of 64 tokens."""
    method = {"group": 8, "thought_length": 64}
    train = {"batch": 32, "rollout_batch": rows}
    return config(train=train, method=method, update={"tokens_per_chunk": tokens}, **sections)


def setup(options: Config, gigabytes: float, name: str = "cuda") -> Setup:
    """A card of which 1 GiB is kept for the context, and 200 MB hold the weights and all that is as large."""
    shape = dataclasses.replace(TINY, vocab=10_000, parameters=10_000_000, saved=SavedBytes(fp32=20_000))
    return Setup(config=options, shape=shape, machine=Device(name=name, memory=gigabytes * 1e9), max_prefix=8)


def fits(one: Setup, rows: int, tokens: int) -> bool:
    """With the six percent by which the peaks of one H100 are above the model's."""
    changed = one.with_option("train", rollout_batch=rows).with_option("update", tokens_per_chunk=tokens)
    return 1.06 * memory(changed).peak <= one.machine.usable


@pytest.mark.parametrize("gigabytes", [1.6, 1.7, 1.8, 2.4])
def test_a_gpu_is_filled_with_thoughts_first_and_then_with_tokens(gigabytes: float):
    """One more group does not fit beside the smallest chunk that is tried, one more step of tokens not beside these."""
    one = setup(automatic(), gigabytes)
    found = sized(one).config
    rows, tokens = found.train.rollout_batch, found.update.tokens_per_chunk
    first = next(chunk for chunk in (2**16 >> n for n in range(9)) if fits(one, 8, chunk))  # down to 256
    assert rows == max(count for count in range(8, 257, 8) if fits(one, count, first))
    assert fits(one, rows, tokens)
    assert tokens == 2**16 or not fits(one, rows, tokens + 256)
    assert tokens % 256 == 0


def test_sizes_have_bounds_and_given_ones_are_kept():
    """One document's thoughts where nothing fits, all of a step's where these do."""
    small, large = (sized(setup(automatic(), gigabytes)).config for gigabytes in (1.2, 9.0))
    assert (small.train.rollout_batch, small.update.tokens_per_chunk) == (8, 256)
    assert (large.train.rollout_batch, large.update.tokens_per_chunk) == (256, 2**16)
    given = sized(setup(automatic(rows=6, tokens=7), 2.0)).config
    assert (given.train.rollout_batch, given.update.tokens_per_chunk) == (6, 7)
    assert sized(setup(automatic(tokens=300), 2.0)).config.update.tokens_per_chunk == 300
    assert sized(setup(automatic(rows=6), 2.0)).config.train.rollout_batch == 6


def test_held_out_documents_count_as_what_is_decoded_at_once():
    """An evaluation with one thought at a position has more documents in memory than a step of the same rows."""
    alone = setup(automatic(rows=64), 2.0)
    both = setup(automatic(rows=64, evaluate={"path": "held-out", "documents": 100}), 2.0)
    assert (alone.decode_documents, both.decode_documents) == (8, 32)  # the buffers of CUDA graphs hold no more
    eager = both.with_option("model", decoding="eager")
    assert eager.decode_documents == 64
    assert eager.with_option("evaluate", thoughts=4).decode_documents == 16
    part, plain = "documents' KV cache and states", alone.with_option("model", decoding="eager")
    assert memory(eager).decode[part] == 8 * memory(plain).decode[part]


def test_a_cpu_has_the_same_sizes_whatever_its_memory():
    """At most 2 GiB while decoding: fewer thoughts of a model with many logits."""
    few, many = (sized(setup(automatic(), gigabytes, "cpu")).config for gigabytes in (0.0, 500.0))
    assert few == many
    assert few.train.rollout_batch == 256
    one = setup(automatic(), 0.0, "cpu")
    rows = sized(dataclasses.replace(one, shape=dataclasses.replace(TINY, vocab=2**20))).config.train.rollout_batch
    at_most = 2 * 2**30 // (28 * 2**20)  # a logit takes 28 bytes; all else is small
    assert at_most - 8 <= rows <= at_most


def test_the_plan_shows_the_sizes_that_a_run_chooses():
    options = automatic()
    planned = plan(options, TINY, Options(gpu="l40s"))
    chosen = sized(Setup(config=options, shape=TINY, machine=planned.job.machine, max_prefix=8)).config
    figures = as_dict(planned)
    assert figures["rollout_batch"] == chosen.train.rollout_batch
    assert figures["tokens_per_chunk"] == chosen.update.tokens_per_chunk == 2**16
    assert figures["fits"]


def test_a_run_records_what_it_chose_and_a_resume_takes_it_again(tmp_path: Path):
    """Also where the options that it is resumed with name none; one process of a run of two would choose others."""
    values = options(tmp_path, "run", train={"steps": 2})
    heard = Notes()
    train(from_dict(values), heard)
    saved = RunLog.open(tmp_path / "run").config()
    assert (saved.train.rollout_batch, saved.update.tokens_per_chunk) == (126, 48)  # 128 in documents of six thoughts
    assert heard.said == ["train.rollout_batch = 126, update.tokens_per_chunk = 48 (fixed on a CPU)"]
    run = cut(tmp_path / "run", "again", 1)
    resume(run, config=from_dict(values))
    assert RunLog.open(run).config().train.rollout_batch == 126
    assert_same_run(run, tmp_path / "run")


def test_free_memory_is_asked_of_the_device_and_the_smallest_rank_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from forethought.trainer import _fitting_sizes

    values = options(tmp_path, "run", model={"device": "cuda"}, update={"tokens_per_chunk": 0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10**8)
    found = {}
    for free in (10**9, 80 * 10**9):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        found[free] = _fitting_sizes(from_dict(values))
    small, large = found.values()
    assert large == [126, 2**16, 801 * 10**8]
    assert small == [6, 256, 11 * 10**8]  # less than the context takes

    def gather(values: list[Any], mine: Any) -> None:  # a second rank with the smaller card
        values[:] = [mine, small if isinstance(mine, tuple) else mine]

    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 0}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert _fitting_sizes(from_dict(values)) == small


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")


def test_out_of_memory_halves_what_was_chosen_once(tmp_path: Path):
    train(from_dict(options(tmp_path, "whole", train={"steps": 3})))
    values = options(tmp_path, "run", train={"steps": 3})
    after_forwards(800, out_of_memory)
    assert train(from_dict(values))["steps"] == 3
    run = tmp_path / "run"
    saved = RunLog.open(run).config()
    assert (saved.train.rollout_batch, saved.update.tokens_per_chunk) == (63, 48)  # 48 were given
    [said] = read_lines(run / "warnings.jsonl")
    assert said["evidence"] == "train.rollout_batch = 63 (was 126)"
    assert drift(run, tmp_path / "whole") < 1e-5
    after_forwards(400, lambda: after_forwards(200, out_of_memory) or out_of_memory())
    with pytest.raises(RunError, match=r"^CUDA out of memory after step \d; saved after step \d; train --resume"):
        train(from_dict({**values, "overwrite": True}))
    assert RunLog.open(run).config().train.rollout_batch == 63


def test_sizes_that_memory_did_not_choose_are_halved_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of next-token training: the tokens at once that were automatic, and no thoughts, which it does not sample."""
    values = options(tmp_path, "run", method={"name": "cpt"}, train={"steps": 2}, update={"tokens_per_chunk": 0})
    passes = iter((CPT.forward_backward, lambda *_: out_of_memory()))
    monkeypatch.setattr(CPT, "forward_backward", lambda *args, own=CPT.forward_backward: next(passes, own)(*args))
    assert train(from_dict(values))["steps"] == 2
    saved = RunLog.open(tmp_path / "run").config()
    model = load_model(saved.model, 0)
    assert (saved.train.rollout_batch, saved.update.tokens_per_chunk) == (0, chunk_tokens(model, 0) // 2)
