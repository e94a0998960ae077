"""Adapters: what they start as, their gradients, the teacher's, what is saved, and what runs with them leave."""

import copy
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from forethought import eval
from forethought.algo.position_sampler import PositionSampler
from forethought.algo.rlp import RLP
from forethought.config import Config, Lora, Model, UserError, from_dict, load, registry
from forethought.data.corpus import Window
from forethought.data.positions import ThoughtFormat
from forethought.eval import evaluate
from forethought.flops import Shape, backward_flops, forward_flops
from forethought.models import lora
from forethought.models.compute_copy import Network
from forethought.models.logprobs import no_think_logp
from forethought.prefix import enable
from forethought.run import checkpoint
from forethought.run.folder import RunLog, read_lines
from forethought.trainer import resume, train
from helpers.architectures import CONFIGS
from helpers.architectures import model as tiny_model
from helpers.flops import counted, counts
from helpers.models import (
    FORM,
    LONG,
    MODELS,
    WINDOWS,
    assert_close,
    collected,
    config,
    engine,
    plain_logits,
    qwen3,
    update,
    window,
    word_tokenizer,
)
from helpers.runs import (
    assert_same_run,
    assert_same_trajectory,
    cut,
    options,
    processes,
    read_checkpoint,
    settings,
    together,
)
from helpers.sampling import assert_same, both

__all__ = ["processes"]  # a fixture
TOKENS = [5, 6, 7, 8, 9]
HIT = {"lora": {"r": 4, "alpha": 8}, "evaluate": {"path": "world:cups/heldout", "documents": 6}}


def with_adapters(options: Config, **lora_options: Any) -> Config:
    return dataclasses.replace(options, lora=Lora(**({"r": 3, "alpha": 6} | lora_options)))


def shaken(network: Network, seed: int = 0, scale: float = 0.3) -> Network:
    """With adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in network.weights.parameters():
            one.add_(torch.randn(one.shape, generator=generator), alpha=scale)
    network.sync()
    return network


def adapted(model: Any, options: Config) -> Network:
    network = lora.add_adapters(model, options)
    enable(network.model)
    return network


def method(network: Network, options: Config, form: ThoughtFormat = FORM) -> Any:
    build = registry.load("method", options.method.name)
    return build(network, engine(network.model, options, form), form, word_tokenizer(), options)


def merged(network: Network, options: Config) -> dict[str, torch.Tensor]:
    factors = {name.replace("/", "."): one for name, one in network.weights.named_parameters()}
    return lora.merged_weights(network.model, factors, options.lora)


@pytest.mark.parametrize("name", MODELS)
def test_fresh_adapters_change_nothing_and_the_merged_weights_compute_what_adapters_do(name: str):
    plain, options = MODELS[name](), with_adapters(config())
    network = adapted(copy.deepcopy(plain), options)
    assert type(network.model) is type(plain)
    assert torch.equal(plain_logits(network.model, TOKENS), plain_logits(plain, TOKENS))
    shaken(network)
    changed = plain_logits(network.model, TOKENS).detach()
    assert not torch.allclose(changed, plain_logits(plain, TOKENS), atol=1e-2)
    plain.load_state_dict(merged(network, options))
    assert_close([plain_logits(plain, TOKENS).detach()], [changed])


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_gradient_is_that_of_the_merged_weights_by_the_chain_rule(weight: float):
    """With W = W0 + s B A: dL/dB = s dL/dW A^T, dL/dA = s B^T dL/dW. All else has no gradient."""
    options, plain = with_adapters(config(tokens=24, prediction_weight=weight)), qwen3()
    network = shaken(adapted(copy.deepcopy(plain), options))
    plain.load_state_dict(merged(network, options))
    learned = method(network, options)
    pieces = collected(learned, WINDOWS, 1).microbatches
    found = dict(zip(dict(network.weights.named_parameters()), update(learned, pieces), strict=True))
    assert all(one.grad is None for one in network.model.parameters())
    whole = method(Network(plain, "fp32"), options)
    slopes = dict(zip(dict(plain.named_parameters()), update(whole, pieces), strict=True))
    scale, got, wanted = options.lora.alpha / options.lora.r, [], []
    for name, factor in network.weights.named_parameters():
        owner, _, part = name.rpartition("/default/")[0].rpartition("/")
        slope = slopes[owner.replace("/", ".") + ".weight"]
        other = network.weights[f"{owner}/{'lora_A' if part == 'lora_B' else 'lora_B'}/default/weight"].detach()
        got.append(found[name])
        wanted.append(scale * (slope @ other.T if part == "lora_B" else other.T @ slope))
        assert factor.shape == found[name].shape
    assert_close(got, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_shared_prefixes_and_checkpointed_layers_have_the_gradients_of_copies(name: str):
    found = []
    for prefix, checkpointing in (("replicated", False), ("shared", False), ("shared", True), ("replicated", True)):
        options = with_adapters(config(tokens=24, prefix=prefix, positions=2, batch=8))
        options = dataclasses.replace(options, update=dataclasses.replace(options.update, checkpointing=checkpointing))
        learned = method(shaken(adapted(MODELS[name](), options), scale=0.1), options, LONG)
        pieces = collected(learned, WINDOWS, 1).microbatches
        found.append(update(learned, pieces))
    for other in found[1:]:
        assert_close(other, found[0])
    assert all(torch.equal(one, same) for one, same in zip(found[1], found[2], strict=True))
    assert all(torch.equal(one, same) for one, same in zip(found[0], found[3], strict=True))


def held_bytes(learned: RLP, pieces: Sequence[Any]) -> int:
    """Bytes that autograd holds at most during an update, each storage once, weights left out."""
    known = {one.untyped_storage().data_ptr() for one in learned.network.model.parameters()}
    held: dict[int, list[int]] = {}
    most = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor):
            nonlocal most
            self.tensor, self.at = tensor, tensor.untyped_storage().data_ptr()
            if self.at not in known:
                held.setdefault(self.at, [0, tensor.untyped_storage().nbytes()])[0] += 1
            most = max(most, sum(size for _, size in held.values()))

        def __del__(self) -> None:
            if self.at in held:
                held[self.at][0] -= 1
                if not held[self.at][0]:
                    del held[self.at]

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda one: one.tensor):
        for piece in pieces:
            learned.forward_backward(piece)
    return most


def test_checkpointing_bounds_what_is_held_for_the_backward_pass():
    """With twice the layers it grows by their inputs alone."""
    document = Window(document="d", start=0, tokens=[5, 6, 7, 8, 9, 10, 11, 6] * 12, marks={})
    found = []
    for checkpointing in (False, True):
        options = with_adapters(config(batch=1, tokens=1024))
        options = dataclasses.replace(options, update=dataclasses.replace(options.update, checkpointing=checkpointing))
        learned = method(adapted(qwen3(width=64), options), options)
        found.append(held_bytes(learned, collected(learned, [document], 1).microbatches))
    assert found[1] < 0.4 * found[0]


def test_the_teacher_is_an_average_of_factors_on_the_same_model():
    """At the start the policy; later the EMA of A and B, which is not that of B A. The policy stays what it is."""
    options = with_adapters(config(ema=0.75, freeze_teacher=False))
    network = adapted(qwen3(), options)
    learned = method(network, options)
    positions = learned.position_sampler.draw(WINDOWS, 1)
    policy = no_think_logp(network.model, positions, 64)[0]
    assert torch.equal(learned.teacher_scores(positions, 1)[0], policy)
    start = [one.detach().clone() for one in network.weights.parameters()]
    shaken(network)
    learned.after_step()
    moved = no_think_logp(network.model, positions, 64)[0]
    got = learned.teacher_scores(positions, 1)[0]
    assert torch.equal(no_think_logp(network.model, positions, 64)[0], moved)
    twin = adapted(qwen3(), options)
    with torch.no_grad():
        for mine, first, last in zip(twin.weights.parameters(), start, network.weights.parameters(), strict=True):
            mine.copy_(0.75 * first + 0.25 * last)
    twin.sync()
    assert_close([got], [no_think_logp(twin.model, positions, 64)[0].detach()])
    assert not torch.allclose(got, policy, atol=1e-3)
    assert not torch.allclose(got, moved, atol=1e-3)


def test_thoughts_decode_over_static_buffers_as_without():
    """What a GPU captures, and where adapters are switched in place between two replays."""
    options = with_adapters(config(group=8, thought_length=12, positions=2, temperature=1.2))
    network = shaken(adapted(qwen3(), options), scale=0.1)
    assert_same(*both(network.model, FORM, options, 64))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "rlp", "kl_weight": 0.1},
        {"name": "rpt", "position_policy": "entropy", "reward": "random"},
        {"name": "mixed"},
        {"name": "cpt"},
    ],
    ids=lambda changes: changes["name"],
)
def test_in_bf16_the_weights_lie_there_once_and_every_method_trains_fp32_factors(changes: dict[str, Any]):
    options = with_adapters(config(tokens=64, **changes))
    options = dataclasses.replace(options, model=Model(precision="bf16", device="cpu"))
    network = adapted(qwen3(), options)
    learned = method(network, options)
    assert {one.dtype for one in network.model.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in network.weights.parameters()} == {torch.float32}
    frozen = [one.detach().clone() for one in network.model.parameters() if not one.requires_grad]
    optimizer = torch.optim.AdamW(network.weights.parameters(), lr=1e-2, weight_decay=0.0)
    start = [one.detach().clone() for one in network.weights.parameters()]
    for step in (1, 2):
        optimizer.zero_grad()
        batch = collected(learned, WINDOWS, step)
        for piece in batch.microbatches:
            learned.forward_backward(piece)
        optimizer.step()
        network.sync()
        learned.after_step()
    assert any(not torch.equal(one, then) for one, then in zip(network.weights.parameters(), start, strict=True))
    still = [one for one in network.model.parameters() if not one.requires_grad]
    assert all(torch.equal(one, then) for one, then in zip(still, frozen, strict=True))
    for low, own in zip(
        [one for one in network.model.parameters() if one.requires_grad], network.weights.parameters(), strict=True
    ):
        assert torch.equal(low, own.bfloat16())
    held = sum(one.numel() for some in learned.state().values() for one in some.parameters())
    assert held <= 2 * sum(one.numel() for one in network.weights.parameters())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of adapters."""
    folder = tmp_path_factory.mktemp("lora")
    train(from_dict(options(folder, "run", **HIT)))
    return folder / "run"


def test_a_checkpoint_holds_adapters_alone_and_a_resumed_run_is_the_run(run: Path):
    tensors = read_checkpoint(checkpoint.latest(run)).tensors  # type: ignore[arg-type]
    assert all("/lora_" in name for name in tensors if not name.startswith("optimizer/"))
    saved = sum(one.numel() for name, one in tensors.items() if name.startswith("policy/"))
    assert saved == json.loads((run / "summary.json").read_text())["trained_parameters"]
    other = cut(run, "cut", 5)
    resume(other)
    assert_same_run(other, run)


def test_the_mismatch_of_sampler_and_trainer_stays_rounding(run: Path):
    rows = read_lines(run / "metrics.jsonl")
    assert len(rows) == 6
    assert all(row["objective/mismatch"] < 1e-5 and row["objective/ratio"] == pytest.approx(1) for row in rows)
    assert all(row["optim/gradient_norm"] > 0 and row["cost/flops"] > 0 for row in rows)


def test_what_is_exported_is_the_policy_with_its_adapter_for_all_and_for_peft(run: Path):
    options = RunLog.open(run).config()
    network = lora.load_with_adapters(options)
    tensors = read_checkpoint(checkpoint.latest(run), only="policy").tensors  # type: ignore[arg-type]
    network.weights.load_state_dict({name.partition("/")[2]: one for name, one in tensors.items()})
    network.sync()
    wanted = plain_logits(network.model, TOKENS).detach()
    policy = AutoModelForCausalLM.from_pretrained(run / "policy")
    assert policy.dtype == torch.float32
    assert_close([plain_logits(policy, TOKENS).detach()], [wanted])
    base = lora.load_model(options.model, options.seed)
    fresh = plain_logits(base, TOKENS).detach()
    by_peft = PeftModel.from_pretrained(base, run / "policy" / "adapter")
    assert_close([plain_logits(by_peft, TOKENS).detach()], [wanted])
    assert not torch.allclose(fresh, wanted, atol=1e-4)
    assert not any("lora" in name for name in load_file(run / "policy" / "model.safetensors"))


def test_a_run_is_measured_with_its_teacher(run: Path, monkeypatch: pytest.MonkeyPatch):
    """The teacher is the base with the averaged adapter; the gain over the base is that of the run's own summary.

    Policy and teacher are one model whose adapters are switched, so two models are loaded: this one and the base.
    """
    loaded = []
    for module in (eval, lora):
        load = module.load_model
        monkeypatch.setattr(module, "load_model", lambda *some, load=load: loaded.append(some) or load(*some))
    figures, _ = evaluate(run)
    assert len(loaded) == 2
    summary = json.loads((run / "summary.json").read_text())
    for name in ("all/gain_over_base", "all/gain_over_teacher", "all/ce_nothink", "all/ce_think"):
        assert figures[name] == pytest.approx(summary[f"after/{name}"], abs=1e-5), name
    assert figures["all/gain_over_teacher"] != figures["all/gain_over_base"]


def test_in_bf16_a_run_is_measured_with_adapters_beside_the_weights(tmp_path: Path):
    """As in training: merged and rounded, the weights would be those of another model."""
    changes = {"model": {"precision": "bf16"}, "train": {"steps": 2}, "optim": {"learning_rate": 1e-2}}
    train(from_dict(options(tmp_path, "run", **HIT, **changes)))
    figures, _ = evaluate(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("all/gain_over_base", "all/gain_over_teacher", "all/ce_nothink", "all/ce_think", "all/drift"):
        assert figures[name] == pytest.approx(summary[f"after/{name}"], abs=1e-6), name
    assert figures["all/drift"] != 0


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_an_adapter_that_is_not_the_runs_is_a_line(run: Path, tmp_path: Path, damage: str):
    file = shutil.copytree(run, tmp_path / "run") / "policy" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    else:
        save_file({name: one[:1] for name, one in tensors.items()}, file)
    with pytest.raises(UserError, match="is not the adapter of this run"):
        evaluate(tmp_path / "run")


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path: Path, processes: ForkServerContext):
    changes = {"lora": {"r": 4, "alpha": 8}}
    train(from_dict(settings(tmp_path, "one", "attention", **changes)))
    two = together(processes, settings(tmp_path, "two", "attention", **changes))
    assert_same_trajectory(tmp_path / "one", two)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--lora.target_modules q_proj,qkv", "lora.target_modules = 'qkv': the model's linear layers are "),
        ("--lora.target_modules lm_head", "lora.target_modules = 'lm_head': the model's linear layers are "),
        ("--parallel.shard zero1", "parallel.shard = 'zero1': with lora.r = 2 "),
        ("--lora.r -1", "lora.r = -1: "),
    ],
)
def test_what_adapters_cannot_do_is_refused_in_a_line(words: str, line: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        train(load("quickstart", ["--run", str(tmp_path / "run"), "--lora.r", "2", *words.split()]))
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_without_peft_a_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^lora\.r: adapters need the peft library .*forethought\[lora\]"):
        train(load("quickstart", ["--run", str(tmp_path / "run"), "--lora.r", "2"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_are_counted_without_torch(name: str):
    """Their weights, and the FLOPs of a pass and its backward pass, as torch's counter sees them.

    Nothing wants a gradient of what goes into the first layer: there autograd leaves out products that are counted.
    """
    policy, tokens, rows = tiny_model(name), torch.ones(2, 11, dtype=torch.long), [(11, 0)] * 2
    lora.inject_adapters(policy, with_adapters(config(), r=2))
    shape = Shape.of(policy.config).adapted(Lora(r=2))
    assert shape.adapter == sum(one.numel() for one in policy.parameters() if one.requires_grad)
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            logits = policy(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
            if backward:
                logits.sum().backward()
        seen = counts(counter)
        if "convolution_backward" in seen:  # of which torch's count is wrong where there are groups
            seen["convolution_backward"] = seen["convolution"]
        taken = forward_flops(shape, rows, 2, causal=False)
        taken += backward * backward_flops(shape, rows, 2, causal=False)
        first = dict(policy.base_model.layers[0].named_modules())
        read = [one for end, one in first.items() if end.endswith(("q_proj", "k_proj", "v_proj", "in_proj"))]
        products = sum(one.base_layer.weight.numel() + one.lora_A["default"].weight.numel() for one in read)
        assert sum(seen.values()) == taken - backward * 2 * tokens.numel() * products


@pytest.mark.parametrize("targets", [["q_proj"], ["layers.1.mlp.down_proj"], ["down_proj", "1.mlp.down_proj"]])
def test_adapters_of_one_layer_are_counted_alone(targets: list[str]):
    policy, options = qwen3(), with_adapters(config(), r=2, target_modules=targets)
    lora.inject_adapters(policy, options)
    weights = sum(one.numel() for one in policy.parameters() if one.requires_grad)
    assert Shape.of(policy.config).adapted(options.lora).adapter == weights


@pytest.mark.parametrize("proxy", ["", "policy"])
def test_entropies_that_choose_positions_are_counted_with_the_adapters(proxy: str):
    options = with_adapters(config(position_policy="entropy", proxy=proxy))
    model = qwen3()
    model.set_attn_implementation("eager")
    network = lora.add_adapters(model, options)
    places = PositionSampler(network, None, FORM, word_tokenizer(), options)
    windows, rows = [window(5, 6, 7, 8, 9), window(6, 5, 9, 8, 7)], [(4, 0), (4, 0)]
    with FlopCounterMode(display=False) as counter:
        places.draw(windows, 1)
    shape = Shape.of(model.config).adapted(options.lora)
    assert counted(counter) == forward_flops(shape, rows, 8, causal=False)
    assert places.flops(windows) == forward_flops(shape, rows, 8)
