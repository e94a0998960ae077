"""Layers that read thoughts, compiled once for all sizes (update.compile): the same gradients, few compilations."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forethought.config import Config, Model, Update, UserError
from forethought.models.lora import load_network
from helpers.models import config, qwen3, rlp
from helpers.runs import hybrid

COMPARE = """
import sys, torch
from torch._dynamo.utils import counters
from forethought.data.positions import at_positions
from forethought.models.fused import fuse
from forethought.models.logprobs import ScoringOptions, ThoughtBatch, forward_backward
from forethought.prefix import enable
from helpers.models import FORM, qwen3, window

model = qwen3()
enable(model)
assert fuse(model)
windows = [window(*range(5, 12), 5, 6), window(9, 8, 7, 6, 5)]

def rows(group, longest):
    tokens = torch.randint(5, 12, (3, group, longest), generator=torch.Generator().manual_seed(longest))
    places = at_positions(windows, [[3, 8], [4]], 1)
    return ThoughtBatch.from_positions(FORM, places, tokens, torch.ones_like(tokens, dtype=torch.bool))

def gradients(batch, compiled):
    model.zero_grad()
    how = {"temperature": 0.7, "tokens": 60, "shared": True, "checkpointing": sys.argv[1] == "True"}
    options = ScoringOptions(**how, compiled=compiled)
    forward_backward(model, FORM, batch, options, lambda logp, targets, some: (logp * (1 + some[:, None])).sum())
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

for size in ((3, 7), (2, 9)):  # the second makes sizes dynamic
    gradients(rows(*size), True)
known = counters["stats"]["unique_graphs"]
for size in ((4, 5), (5, 12), (3, 7)):
    batch = rows(*size)
    wanted, found = gradients(batch, False), gradients(batch, True)
    print(float((wanted - found).abs().max() / wanted.abs().max()))
assert "forward" not in vars(model.model.layers[0])
print(known, counters["stats"]["unique_graphs"], len(model.model.layers))
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["False", "True"])
def test_compiled_layers_give_the_same_gradients_at_any_size(checkpointing: str):
    """In a process of its own: the tests' type checks cannot be compiled."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", COMPARE, checkpointing]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *gaps, last = done.stdout.splitlines()
    assert len(gaps) == 3 and all(float(gap) <= 1e-5 for gap in gaps)
    before, after, layers = map(int, last.split())
    assert layers > 1 and 0 < before == after, "neither a layer nor a size is compiled again"


def test_models_with_other_layers_are_refused(tmp_path: Path):
    path = str(hybrid(tmp_path))
    with pytest.raises(UserError, match=r"^update.compile = True: NemotronHForCausalLM has other layers"):
        load_network(Config(model=Model(path=path, tokenizer="embedded", init="random"), update=Update(compile=True)))


def test_triton_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        UserError,
        match=r"^update.attention = 'triton': needs a GPU and the package triton; use update.attention flash$",
    ):
        load_network(Config(model=Model(init="random"), update=Update(attention="triton")))


def test_the_options_reach_the_update():
    for chosen in (False, True):
        settings = dataclasses.replace(config(), update=Update(compile=chosen, attention=("flash", "triton")[chosen]))
        scoring = rlp(qwen3(), settings).scoring
        assert (scoring.compiled, scoring.triton) == (chosen, chosen)
