"""The Triton kernels in Triton's interpreter, on a CPU, and compiled for cards that need not be there.

`make test-kernels` installs Triton and runs this file; without TRITON_INTERPRET=1 all of it is skipped.
"""

import importlib
import os
import subprocess
import sys
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from forethought.data.positions import at_positions
from forethought.models import fused
from forethought.models.logprobs import ScoringOptions, ThoughtBatch, forward_backward, thought_logp
from forethought.prefix import attention, enable
from forethought.prefix.attention import Layout, PrefixSuffixKV, merged_attention
from forethought.prefix.suffix_cache import CacheCapacity, StaticKV, Table, _static_reference
from helpers import architectures
from helpers.models import FORM, qwen3, window
from helpers.operations import Operations

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="for `make test-kernels`: needs Triton and its interpreter"
)

SPREAD = ([0, 0, 0, 1, 1, 3], [5, 40, 40, 33, 70, 12])  # several positions a document; document 2 has no rows


def kernels() -> Any:
    """The module, which cannot be imported without Triton."""
    return importlib.import_module("forethought.prefix.kernels")


CASES: dict[str, dict[str, Any]] = {
    "one position": {"rows": ([0] * 3, [40] * 3), "heads": (2, 2, 16), "suffix": (7, 7)},
    "many": {"rows": SPREAD, "heads": (2, 3, 48), "suffix": (37, 37)},
    "large heads": {"rows": SPREAD, "heads": (1, 2, 256), "suffix": (20, 20)},
    "window": {"rows": SPREAD, "heads": (1, 1, 16), "suffix": (37, 37), "window": 20},
    "later queries": {"rows": SPREAD, "heads": (2, 2, 16), "suffix": (37, 20), "start": [0, 3, 0, 5, 0, 0]},
    "documents without rows": {"rows": SPREAD, "heads": (2, 2, 16), "suffix": (7, 7), "documents": 7},
    "both": {"rows": SPREAD, "heads": (2, 2, 8), "suffix": (37, 20), "start": [0, 3, 0, 5, 0, 0], "window": 25},
}


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape and float(wanted.abs().max()) > 0
    assert float((found - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_row_attention_is_merged_attention(name: str):
    """Output and all gradients; keys, values and gradients with the strides that models give them, or others."""
    from forethought.prefix.kernels import row_attention

    case, generator = CASES[name], torch.Generator().manual_seed(0)
    (documents, lengths), (heads, fan, size), (suffix, width) = case["rows"], case["heads"], case["suffix"]
    layout = Layout.of(documents, lengths, torch.device("cpu"))

    def random(batch: int, length: int, heads: int, transposed: bool = True) -> torch.Tensor:
        shape = (batch, length, heads, size) if transposed else (batch, heads, length, size)
        made = torch.randn(shape, generator=generator)
        return (made.transpose(1, 2) if transposed else made).requires_grad_()

    rows, longest = len(documents), max(lengths)
    query, grad = random(rows, width, heads * fan), random(rows, width, heads * fan, name == "many").detach()
    count = case.get("documents", max(documents) + 1)
    keys, values = random(count, longest, heads), random(count, longest, heads, name != "many")
    own_keys, own_values = random(rows, suffix, heads, False), random(rows, suffix, heads)
    start = torch.tensor(case["start"]) if "start" in case else None
    key, value = (PrefixSuffixKV(a, b, layout, start) for a, b in ((keys, own_keys), (values, own_values)))
    tensors = (query, keys, values, own_keys, own_values)
    wanted = merged_attention(query, key, value, size**-0.5, case.get("window"))
    found = row_attention(*tensors, layout, start, size**-0.5, case.get("window"))
    assert_close(found.detach(), wanted.detach())
    for one, other in zip(
        torch.autograd.grad(found, tensors, grad), torch.autograd.grad(wanted, tensors, grad), strict=True
    ):
        assert_close(one, other)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "nemotron_h"])
def test_updates_are_the_same(name: str):
    """Grouped queries, sliding windows, a hybrid: gradients of the weights, and log-probabilities."""
    if name == "qwen3":
        model = qwen3()
    else:
        torch.manual_seed(0)
        model = architectures.AutoModelForCausalLM.from_config(architectures.CONFIGS[name]).eval()
    enable(model)
    windows = [window(*range(5, 12), 5, 6), window(9, 8, 7, 6, 5)]
    tokens = torch.randint(5, 12, (3, 3, 7), generator=torch.Generator().manual_seed(1))
    rows = ThoughtBatch.from_positions(
        FORM, at_positions(windows, [[3, 8], [4]], 1), tokens, torch.ones_like(tokens).bool()
    )
    weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(2))
    found, scores = [], []
    for triton in (False, True):
        model.zero_grad()
        options = ScoringOptions(temperature=0.7, tokens=60, shared=True, triton=triton)
        scores.append(thought_logp(model, FORM, rows, options))
        forward_backward(model, FORM, rows, options, lambda logp, _, some: (logp * weight[some, : logp.shape[1]]).sum())
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for plain, kernel in (found, scores):
        assert float((plain - kernel).abs().max()) <= 1e-5 * float(plain.abs().max())
    assert not torch.equal(*found), "the kernels ran"


def test_operations_do_not_grow_with_the_positions(monkeypatch: pytest.MonkeyPatch):
    """Of a layer's attention, forward and backward; flash attention as on a GPU, position by position."""
    monkeypatch.setattr(attention, "_SPARSE", 0)

    def operations(positions: int, triton: bool) -> int:
        lengths = [32 * (i // 16 + 1) // positions for i in range(16 * positions)]
        layout = Layout.of([0] * len(lengths), lengths, torch.device("cpu"))
        sizes = [(len(lengths), 8, 4, 16), *[(1, 32, 2, 16)] * 2, *[(len(lengths), 8, 2, 16)] * 2]
        tensors = [torch.randn(size).transpose(1, 2).requires_grad_() for size in sizes]
        query, keys, values, *own = tensors
        key, value = (PrefixSuffixKV(*pair, layout, None, triton) for pair in ((keys, own[0]), (values, own[1])))
        grad = torch.ones_like(query)
        with Operations() as found:
            torch.autograd.grad(merged_attention(query, key, value, 0.25), tensors, grad)
        return found.count

    launched: list[Any] = []
    for name in ("_rows", "_rows_back", "_keys_back"):
        kernel = MagicMock()
        kernel.__getitem__.return_value = lambda *args, **kwargs: launched.append(args)
        monkeypatch.setattr(f"forethought.prefix.kernels.{name}", kernel)
    assert [operations(positions, False) for positions in (1, 32)] == [36, 533]
    assert [operations(positions, True) for positions in (1, 32)] == [1, 1] and len(launched) == 2 * 4


ROTARY = {  # rows, query heads, key heads, steps, size, rows of cos and sin
    "each row its own": (2, 6, 2, 5, 16, 2),
    "one for all": (3, 5, 1, 4, 48, 1),
    "one step": (4, 4, 4, 1, 32, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROTARY)
def test_rotary_is_that_of_transformers(name: str, dtype: torch.dtype):
    """Outputs and gradients of parts of a joint product, in two kernels where transformers takes 24 operations."""
    from forethought.prefix.kernels import rotary

    rows, heads, fewer, steps, size, own = ROTARY[name]
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(rows, steps, heads + fewer, size, generator=generator).to(dtype).transpose(1, 2)
    q, k = (part.requires_grad_() for part in joint.split([heads, fewer], 1))
    cos, sin = (torch.randn(own, steps, size, generator=generator).to(dtype) for _ in range(2))
    grads = [torch.randn(part.shape, generator=generator).to(dtype) for part in (q, k)]
    found = []
    for rotate in (rotary, apply_rotary_pos_emb):
        with Operations() as operations:
            out = rotate(q, k, cos, sin)
            grads_in = torch.autograd.grad(out, (q, k), grads)
        found.append([*(one.detach() for one in out), *grads_in])
    assert operations.count == 24
    for one, wanted in zip(*found, strict=True):
        assert one.shape == wanted.shape and one.stride(-1) == 1 and bool(wanted.abs().amax() > 1)
        gap = float((one - wanted).abs().max() / wanted.abs().max())
        assert gap <= (0 if dtype == torch.float32 else 2**-7)  # bf16 is rounded once, not three times


def test_families_rotate_in_one_kernel_where_it_does_the_same(monkeypatch: pytest.MonkeyPatch):
    """Cohere's function rotates neighbors instead of halves: it is left alone, as are all devices without kernels."""
    names = ("llama", "cohere")
    spaces = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in names]
    originals = [space.apply_rotary_pos_emb for space in spaces]
    for space, original in zip(spaces, originals, strict=True):
        monkeypatch.setattr(space, "apply_rotary_pos_emb", original)  # restored after the test
    like, launched = torch.ones(1), []
    for space in spaces:
        fused._fuse_rotary(space, like)
    assert [space.apply_rotary_pos_emb for space in spaces] == originals
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ("cpu",))
    for space in spaces * 2:
        fused._fuse_rotary(space, like)
    assert [space.apply_rotary_pos_emb is one for space, one in zip(spaces, originals, strict=True)] == [False, True]

    rotated = kernels()._rotated
    monkeypatch.setattr(kernels(), "_rotated", lambda *args, **kwargs: launched.append(1) or rotated(*args, **kwargs))
    q, cos, sin = torch.randn(2, 3, 4, 16), torch.randn(1, 4, 16), torch.randn(1, 4, 16)
    cases = [(q, q[:, :1], cos, sin), (q.double(), q.double(), cos, sin), (q.mT, q.mT, cos.mT, sin.mT.contiguous())]
    for case in cases:
        for wanted, found in zip(originals[0](*case), spaces[0].apply_rotary_pos_emb(*case), strict=True):
            assert torch.equal(wanted, found)
    assert len(launched) == 1, "only the first is what the kernel supports"


@pytest.mark.parametrize("window", [0, 9])
def test_decode_attention_is_that_of_plain_products(window: int):
    """Documents with different numbers of rows, in several pieces, and one without rows."""
    from forethought.prefix.kernels import decode_attention

    generator = torch.Generator().manual_seed(0)
    documents, lengths, heads, fan, size = [0, 0, 0, 1, 1, 3], [5, 40, 40, 33, 170, 12], 2, 3, 48
    capacity = CacheCapacity(rows=6, documents=4, slots=3, prefix=170, suffix=40)
    table = Table.of(capacity, torch.device("cpu"))
    table.fill(documents, lengths)
    table.column.fill_(36)
    shared, own = (4, heads, 170, size), (6, heads, 40, size)
    keys, values = (torch.randn(shared, generator=generator) for _ in range(2))
    own_keys, own_values = (torch.randn(own, generator=generator) for _ in range(2))
    query = torch.randn(6, heads * fan, size, generator=generator)
    key, value = StaticKV(keys, own_keys, table), StaticKV(values, own_values, table)
    wanted = _static_reference(query.unsqueeze(2), key, value, 0.3, window or None).squeeze(2)
    numbers = (table.slots, table.longest, table.prefix_lengths, table.column)
    found = decode_attention(query, keys, values, own_keys, own_values, *numbers, 0.3, window)
    assert_close(found, wanted)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from forethought.prefix import kernels

capability, size, dtype = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
tile, warps = kernels.tile_and_warps(size, 2 if dtype == "bf16" else 4)
shape = {"HEADS": 8, "FAN": 2, "SIZE": size, "WIDE": size, "WINDOW": 0, "TILE": tile, "BLOCK": tile}
turned = {"HALF": size // 2, "WIDE": size // 2, "MANY": 16, "FEW": 8, "BACK": 1}
kinds = dict.fromkeys(("count", "slot", "width", "suffix", "length", "steps", "q_heads", "k_heads"), "i32")
kinds |= dict.fromkeys(("lse", "delta"), "*fp32")
kinds |= dict.fromkeys(("documents", "stops", "begins", "slots"), "*i64") | {"scale": "fp32"}
parts = ("row", "head", "step", "document", "batch")
kinds |= {f"{tensor}_{part}": "i32" for tensor in ("q", "p", "s", "k", "qo", "ko", "c") for part in parts}
keys_back = [("_keys_back", shape | {"PREFIX": prefix}) for prefix in (1, 0)]
for name, constants in [("_rows", shape), ("_rows_back", shape), *keys_back, ("_rotate", turned)]:
    kernel = getattr(kernels, name)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*" + dtype) for name in names}
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    strides = [name for name in names if name.endswith(tuple(f"_{part}" for part in parts))]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in [*strides, *pointers]},
    )
    card = GPUTarget("cuda", capability, 32)
    done = triton.compile(source, target=card, options={"num_warps": warps, "num_stages": 2})
    print(done.metadata.shared, len(done.asm["cubin"]))
"""


@pytest.mark.parametrize(
    ("capability", "size", "dtype"),
    [(80, 128, "bf16"), (90, 128, "bf16"), (90, 64, "bf16"), (90, 256, "bf16"), (90, 128, "fp32")],
)
def test_kernels_compile_and_fit_into_shared_memory(capability: int, size: int, dtype: str):
    """Of an A100 and an H100, and of consumer cards with 99 KiB."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(capability), str(size), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(found) == 5 and all(code > 1000 and shared <= 99 * 1024 for shared, code in found), found
