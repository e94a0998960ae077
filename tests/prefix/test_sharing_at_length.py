"""Sharing a document over many steps and over many thoughts: the same training, linear work, bounded memory."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from forethought import prefix
from forethought.config import from_dict, merge
from forethought.data.corpus import Window
from forethought.data.positions import ThoughtFormat, at_positions
from forethought.models.logprobs import ScoringOptions, ThoughtBatch, forward_backward
from forethought.trainer import train
from helpers.runs import options

FORM = ThoughtFormat(before=(), after=(), open=(3, 5), close=(4,), bos=None, pad=0)
HYBRID = hf.NemotronHConfig(
    vocab_size=35,
    hidden_size=32,
    layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"],
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=48,
    ssm_state_size=8,
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=2,
    chunk_size=8,
    mamba_proj_bias=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    initializer_range=0.08,
)


def trained(tmp_path: Path, name: str, steps: int, changes: dict[str, Any], architecture: str) -> torch.Tensor:
    """All weights after some steps, as one vector."""
    values = options(tmp_path, name, **merge(changes, {"train": {"steps": steps, "checkpoint_every": 100}}))
    if architecture == "hybrid":
        HYBRID.save_pretrained(tmp_path / "architecture")
    train(from_dict(values))
    tensors = load_file(tmp_path / name / "policy" / "model.safetensors")
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


@pytest.mark.parametrize("architecture", ["attention", "hybrid"])
def test_twenty_steps_are_the_same_with_sharing_on_and_off(tmp_path: Path, architecture: str):
    """The drift between the two is a small part of the way that the weights go, in the maximum and in the mean."""
    changes: dict[str, Any] = {"optim": {"learning_rate": 1e-3}, "update": {"tokens_per_chunk": 0}}
    start = trained(tmp_path, "start", 1, merge(changes, {"optim": {"learning_rate": 1e-30}}), architecture)
    shared, copied = (
        trained(tmp_path, way, 20, merge(changes, {"model": {"prefix": way}}), architecture)
        for way in ("shared", "replicated")
    )
    way, drift = (shared - start).abs(), (shared - copied).abs()
    assert float(way.mean()) > 1e-3
    assert 0 < float(drift.max()) < 1e-3 * float(way.max())
    assert float(drift.mean()) < 2e-5 * float(way.mean())


LENGTH, DOCUMENT, PLACES = 12, 60, (15, 30, 45, 60)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = hf.Qwen3Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    made = hf.Qwen3ForCausalLM(config).eval()
    prefix.enable(made)
    return made


class SavedBytes:
    """Bytes that autograd saves for the backward pass, and their peak. Views of one storage count once."""

    def __init__(self) -> None:
        self.count: dict[int, int] = {}
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        self.now += 0 if self.count.get(key) else size
        self.count[key] = self.count.get(key, 0) + 1
        self.most = max(self.most, self.now)
        kept = Kept(tensor)
        weakref.finalize(kept, self.drop, key, size)
        return kept

    def drop(self, key: int, size: int) -> None:
        self.count[key] -= 1
        self.now -= 0 if self.count[key] else size


class Kept:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def updated(model: Any, group: int, chunk: int) -> tuple[list[int], int]:
    """Tokens of each forward pass of an update of 4 * group thoughts, and the most bytes kept for its backward pass."""
    generator = torch.Generator().manual_seed(1)
    document = torch.randint(10, 97, (DOCUMENT + 1,), generator=generator).tolist()
    positions = at_positions([Window(document="0", start=0, tokens=document, marks={})], [list(PLACES)], 1)
    tokens = torch.randint(10, 97, (len(PLACES), group, LENGTH), generator=generator)
    rows = ThoughtBatch.from_positions(FORM, positions, tokens, torch.ones_like(tokens, dtype=torch.bool))
    passes: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *some: passes.append(some[1][0].numel()))
    saved = SavedBytes()
    try:
        with saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
            reading = ScoringOptions(temperature=1.0, tokens=chunk, shared=True)
            forward_backward(model, FORM, rows, reading, lambda logp, targets, some: logp.sum())
    finally:
        hook.remove()
        model.zero_grad()
    return passes, saved.most


def test_work_grows_with_the_thoughts_and_memory_with_the_chunk(model):
    """From 16 to 256 thoughts: the document is read once, each thought once, and no more is kept than for one chunk."""
    row = len(FORM.open) + LENGTH
    chunk = 16 * row
    kept = {}
    for thoughts in (16, 32, 64, 128, 256):
        passes, kept[thoughts] = updated(model, thoughts // len(PLACES), chunk)
        assert passes == [DOCUMENT] + [chunk] * (thoughts // 16)
    assert max(kept.values()) < 1.05 * kept[16]
    passes, whole = updated(model, 64, 256 * row)
    assert passes == [DOCUMENT, 256 * row] and whole > 5 * kept[16]


def test_a_suffix_cache_is_freed_with_its_last_reference(model):
    """Its masks and buffers too; in a reference cycle they would stay until the garbage collector runs."""
    cache = prefix.SuffixCache(prefix.read(model, [[5, 6, 7]], [[2, 3]]), [0, 1], 4)
    prefix.backbone(model, torch.tensor([[8], [9]]), cache, cache.position_ids(1))
    alive = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert alive() is None
    finally:
        gc.enable()
