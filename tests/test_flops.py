"""FLOPs: numbers by hand, and what torch's own counter sees of real models and of a whole step.

The counter sees matrix products and convolutions. On a CPU it sees nothing of fused attention (sdpa); of plain
attention it sees the whole rectangle. It counts the backward pass of a grouped convolution as if it had no groups:
nothing is compared with that figure. Of a Mamba-2 step it does not see the state's own update, which is elementwise.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import DynamicCache, Gemma3Config, Qwen3Config

from forethought.algo.rlp import RLP
from forethought.algo.rpt import RPT
from forethought.config import Rollout, UserError, from_dict
from forethought.flops import (
    FAMILIES,
    Attention,
    Flops,
    Mamba,
    Shape,
    Work,
    cpt_step,
    decode_flops,
    equal_flops_steps,
    forward_flops,
    pairs,
    rlp_step,
    step_flops,
    t_flop,
)
from forethought.memory import cache_numbers
from forethought.models.compute_copy import Network
from forethought.prefix import enable
from forethought.rollout import engine
from forethought.rollout.cpp import CppBackend
from forethought.run.folder import RunLog
from forethought.trainer import resume, train
from helpers.architectures import CONFIGS, model
from helpers.flops import counted
from helpers.models import FORM, LONG, MODELS, REPEATING, collected, config, cpt, gpt2, rlp, window, word_tokenizer
from helpers.runs import figures, options

ATTENTION = Attention(heads=2, kv_heads=1, head_dim=3, window=None)
MAMBA = Mamba(heads=2, head_dim=3, state=5, groups=1, kernel=4, chunk=4)
TINY = Shape(model_type="llama", hidden=5, vocab=7, parameters=0, matmul_weights=100, attention=(ATTENTION,), mamba=())
SCAN = dataclasses.replace(TINY, attention=(), mamba=(MAMBA,))
HEAD = 2 * 5 * 7  # FLOPs of one row of logits of TINY


def read(policy: Any, rows: int, tokens: int, keep: int, back: bool) -> FlopCounterMode:
    with FlopCounterMode(display=False) as counter:
        logits = policy(
            input_ids=torch.ones(rows, tokens, dtype=torch.long), use_cache=False, logits_to_keep=keep
        ).logits
        if back:
            logits.sum().backward()
    return counter


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_equals_torchs_count(name: str):
    policy = model(name)
    shape = Shape.of(policy.config)
    for tokens, back in ((6, False), (11, True)):
        expected = forward_flops(shape, [(tokens, 0)] * 2, 2, causal=False)
        assert counted(read(policy, 2, tokens, 1, back)) == (3 if back else 1) * expected


@pytest.mark.parametrize("name", CONFIGS)
def test_with_fused_attention_torch_counts_all_but_attention(name: str):
    policy = model(name, "sdpa")
    shape = Shape.of(policy.config)
    expected = forward_flops(dataclasses.replace(shape, attention=()), [(11, 0)] * 2, 2, causal=False)
    assert counted(read(policy, 2, 11, 1, back=True)) == 3 * expected
    with sdpa_kernel(SDPBackend.MATH):
        assert counted(read(policy, 2, 11, 1, back=True)) == 3 * forward_flops(shape, [(11, 0)] * 2, 2, causal=False)


def test_torchs_formula_for_fused_attention_on_a_gpu():
    """The same forward; 2.5 times that backward, since the kernel computes the scores again, which we do not count."""
    query, keys = (1, 2, 6, 3), (1, 1, 6, 3)
    ours = forward_flops(dataclasses.replace(TINY, matmul_weights=0), [(6, 0)], 0, causal=False)
    assert sdpa_flop_count(query, keys, keys) == ours
    assert sdpa_backward_flop_count(query, query, keys, keys) == 2.5 * ours


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_equals_torchs_count(name: str):
    policy, past, tokens = model(name), 3, 6
    shape, cache = Shape.of(policy.config), DynamicCache(config=policy.config)
    with torch.no_grad():
        policy(input_ids=torch.ones(1, past, dtype=torch.long), past_key_values=cache, use_cache=True)
        with FlopCounterMode(display=False) as counter:
            for _ in range(tokens):
                policy(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert counted(counter) == decode_flops(shape, [(tokens, past)]) + unseen(shape, tokens)


def unseen(shape: Shape, tokens: int) -> int:
    """What the counter sees too much of decoding with Mamba: the convolution's last output and one more, no update."""
    return tokens * sum(2 * one.kernel * one.channels - 2 * one.inner * one.state for one in shape.mamba)


def test_going_on_behind_a_shared_prefix_equals_torchs_count():
    policy = model("llama")
    cache = DynamicCache(config=policy.config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for tokens in (7, 2, 5):
            ids = torch.ones(1, tokens, dtype=torch.long)
            policy(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = [(7, 0), (2, 7), (5, 9)]
    assert counted(counter) == forward_flops(Shape.of(policy.config), rows, 3, causal=False)


@given(st.integers(0, 9), st.integers(0, 9), st.none() | st.integers(1, 12))
def test_pairs_are_what_a_mask_lets_through(tokens: int, past: int, window: int | None):
    query, key = torch.arange(past, past + tokens)[:, None], torch.arange(past + tokens)[None]
    mask = (key <= query) & (query - key < (window or 99))
    assert pairs(tokens, past, window) == int(mask.sum())


def test_a_pass_by_hand():
    """5 tokens: 15 pairs of 2 heads of 3, scores and values. Behind 4 others: 20 more for each head."""
    linear = 2 * 100 * 5 + 3 * HEAD
    assert forward_flops(TINY, [(5, 0)], 3) == linear + 4 * 2 * 3 * 15
    assert forward_flops(TINY, [(5, 4)], 3) == linear + 4 * 2 * 3 * 35
    assert forward_flops(TINY, [(5, 4)], 3, causal=False) == linear + 4 * 2 * 3 * 45
    assert forward_flops(TINY, [(5, 0), (5, 4)], 6) == 2 * linear + 4 * 2 * 3 * 50


def test_a_scan_by_hand():
    """6 tokens in chunks of 4: 13 pairs (5 products for B and C, 6 for values), 30 numbers of state, 16 channels."""
    scan = 13 * 2 * (5 + 6) + 6 * 4 * 30 + 2 * 2 * 30
    assert forward_flops(SCAN, [(6, 0)], 0) == 2 * 100 * 6 + scan + 6 * 2 * 4 * 16
    assert decode_flops(SCAN, [(6, 9)]) == 6 * (2 * 100 + HEAD + 4 * 30 + 2 * 4 * 16)


def test_reading_at_once_or_token_by_token_is_the_same_attention():
    assert decode_flops(TINY, [(5, 4)]) == forward_flops(TINY, [(5, 4)], 5)


WORK = Work(
    windows=(9, 6),
    owners=(0, 0, 1),
    prefixes=(6, 4, 3),
    opening=2,
    thoughts=((3, 5), (1, 4), (2, 2)),
    tails=((0, 1), (0, 1), (0, 0)),
)


def linear(tokens: int, heads: int, seen: int) -> int:
    return 2 * 100 * tokens + HEAD * heads + 4 * 2 * 3 * seen


@pytest.mark.parametrize(
    ("sharing", "prefill", "learned"),
    [
        # prefixes of 6 and 3, then for each thought 2 tokens behind 6, 4 and 3
        ("document", linear(6 + 3 + 6 * 2, 6, 21 + 6 + 2 * (15 + 11 + 9)), None),
        (
            "rollout",
            linear(8 + 6 + 5, 3, 36 + 21 + 15),
            linear(11 + 13 + 7 + 10 + 7 + 7, 17, 66 + 91 + 28 + 55 + 28 + 28),
        ),
        ("none", linear(2 * (8 + 6 + 5), 6, 2 * (36 + 21 + 15)), linear(55, 17, 66 + 91 + 28 + 55 + 28 + 28)),
    ],
)
def test_a_step_by_hand(sharing: Any, prefill: int, learned: int | None):
    step = rlp_step(TINY, dataclasses.replace(WORK, sharing=sharing))
    seen = (9 + 10 + 11) + (9 + 10 + 11 + 12 + 13) + 7 + (7 + 8 + 9 + 10) + 2 * (6 + 7)
    if learned is None:
        learned = linear(6 + 3 + 6 * 2 + 17, 17, 21 + 6 + 2 * (15 + 11 + 9) + seen)
    assert step.prefill == prefill
    assert step.decode == linear(17, 17, seen)
    assert step.score == linear(2, 2, 14 + 11)
    assert step.teacher == linear(15, 3, 45 + 21)
    assert (step.reference, step.update) == (0, 3 * learned)
    assert step.rollout + step.training == step.total == sum(dataclasses.asdict(step).values())


def test_evidence_that_is_read_again_by_hand():
    """Each thought with its targets, a token more than an engine reads that sees the logits itself."""
    again = dataclasses.replace(WORK, tails=(), reread=WORK.tails)
    rows = ((2 + 4, 6), (2 + 7, 6), (2 + 2, 4), (2 + 6, 4), (2 + 3, 3), (2 + 3, 3))
    shared = linear(9 + sum(n for n, _ in rows), 6, 21 + 6 + sum(pairs(*row) for row in rows))
    assert rlp_step(TINY, again).score == shared
    whole = [sum(row) for row in rows]
    copied = linear(sum(whole), 6, sum(pairs(n, 0) for n in whole))
    assert rlp_step(TINY, dataclasses.replace(again, sharing="none")).score == copied
    both = rlp_step(TINY, dataclasses.replace(again, tails=WORK.tails))
    assert both.score == shared + rlp_step(TINY, WORK).score, "a sampler that rounds its weights reads the targets, too"
    assert both.update == rlp_step(TINY, again).update == rlp_step(TINY, WORK).update
    predicting = (dataclasses.replace(one, predicts=True) for one in (again, WORK))
    assert len({rlp_step(TINY, one).update for one in predicting}) == 1


def test_what_is_not_asked_costs_nothing_and_what_is_repeated_costs_again():
    step = rlp_step(TINY, WORK)
    again = rlp_step(TINY, dataclasses.replace(WORK, teacher=False, kl=True, inner_steps=2))
    assert again == dataclasses.replace(step, teacher=0, update=2 * step.update, reference=2 * step.update // 3)
    assert rlp_step(TINY, dataclasses.replace(WORK, kl=True)).reference == step.update // 3
    assert (step + again).total == step.total + again.total


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=5))
def test_sharing_never_costs_more_than_copies(positions: list[tuple[int, int, int]]):
    work = Work(
        windows=(10, 10, 10),
        owners=tuple(owner for owner, _, _ in positions),
        prefixes=tuple(prefix for _, prefix, _ in positions),
        opening=1,
        thoughts=tuple((length, 3) for _, _, length in positions),
        tails=tuple((0, 0) for _ in positions),
    )
    kinds = ("document", "rollout", "none")
    shared, repeated, general = (rlp_step(TINY, dataclasses.replace(work, sharing=kind)) for kind in kinds)
    assert max(shared.total, repeated.total) <= general.total
    assert shared.update <= repeated.update
    assert (shared.decode, shared.score, shared.teacher) == (general.decode, general.score, general.teacher)


WINDOWS = [window(5, 6, 7, 8, 9, 5, 7), window(9, 10, 5, 7, 11, 6, 8)]


# contexts no shorter than a convolution, thoughts that can close
WIDE = dataclasses.replace(LONG, close=FORM.close, closing=FORM.closing)


def run_step(
    policy: Any, form: Any, prefix: Any = "replicated", **changes: Any
) -> tuple[Work, FlopCounterMode, FlopCounterMode]:
    """One step under the counter, without padding: a piece a row, and groups of three shrink as soon as one is done."""
    enable(policy) if prefix == "shared" else policy.set_attn_implementation("eager")
    settings = config(tokens=1, rows=1, group=3, thought_length=4, seed=1, prefix=prefix, **changes)
    method = rlp(policy, settings, form)
    with FlopCounterMode(display=False) as rollout:
        batch = collected(method, WINDOWS, 1)
    with FlopCounterMode(display=False) as update:
        for _ in range(settings.method.inner_steps):
            for piece in batch.microbatches:
                method.forward_backward(piece)
    assert isinstance(batch.work, Work)
    return batch.work, rollout, update


@pytest.mark.parametrize("name", ["qwen3", "nemotron_h"])
def test_a_real_step_equals_torchs_count(name: str):
    policy = MODELS[name]()
    shape = Shape.of(policy.config)
    work, rollout, update = run_step(policy, WIDE)
    expected = rlp_step(shape, work, causal=False)
    thoughts, tails = [n for some in work.thoughts for n in some], [n for some in work.tails for n in some]
    assert len(set(thoughts)) > 1
    assert set(tails) == {0, 1}
    assert counted(rollout) == expected.rollout + unseen(shape, sum(thoughts) + sum(tails))
    assert counted(update) == expected.training


@pytest.mark.parametrize("more", [{}, {"prediction_weight": 0.1}], ids=["paper", "prediction"])
def test_a_real_step_with_everything_on_equals_torchs_count(more: dict[str, Any]):
    policy = MODELS["qwen3"]()
    shape = Shape.of(policy.config)
    work, rollout, update = run_step(policy, LONG, horizon=2, kl_weight=0.1, inner_steps=2, **more)
    expected = rlp_step(shape, work, causal=False)
    assert counted(rollout) + counted(update) == expected.total
    assert expected.reference > 0


def test_a_real_step_that_repeats_the_context_equals_torchs_count():
    policy = MODELS["qwen3"]()
    shape = Shape.of(policy.config)
    work, rollout, update = run_step(policy, REPEATING, horizon=2, prediction_weight=0.1)
    expected = rlp_step(shape, work, causal=False)
    assert counted(rollout) + counted(update) == expected.total
    assert min(n for some in work.tails for n in some) >= REPEATING.repeat


def test_a_real_step_with_shared_prefixes_equals_torchs_count_outside_attention():
    """Without attention: the counter does not see fused kernels, and the plain ones of decoding read padding.

    Of a prefix's last layer only keys and values are used, so its other weights have no backward pass there.
    """
    policy = MODELS["qwen3"]()
    shape = dataclasses.replace(Shape.of(policy.config), attention=())
    work, rollout, update = run_step(policy, WIDE, prefix="shared")
    assert work.sharing == "document"
    assert counted(rollout) - rollout.get_flop_counts()["Global"][torch.ops.aten.bmm] == rlp_step(shape, work).rollout
    unused = 2 * 2 * (shape.matmul_weights // 2 - 2 * shape.hidden * 16)  # of two layers, with one key head of 16
    assert counted(update) == rlp_step(shape, work).training - unused * sum(work.prefixes)
    work, _, update = run_step(policy, WIDE, prefix="shared", positions=2)
    assert len(work.prefixes) > len(work.windows)
    assert counted(update) == rlp_step(shape, work).training - unused * sum(work.prefixes[1::2])


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(("kind", "more"), [(RLP, {"horizon": 3}), (RPT, {"name": "rpt", "prediction_length": 3})])
def test_rounded_weights_read_what_follows_a_thought_and_the_policy_reads_it_again(
    kind: Any, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """torch's counter sees the policy's passes alone; attention is left out, as above."""
    steps, step = [], CppBackend.step
    policy, settings = MODELS["qwen3"](), config(tokens=1, rows=1, thought_length=4, position_policy="uniform", **more)
    model = dataclasses.replace(settings.model, decoding="cpp")
    settings = dataclasses.replace(settings, model=model, rollout=Rollout(precision="bf16"))
    method = kind(Network(policy, "fp32"), engine(policy, WIDE, settings), WIDE, word_tokenizer(), settings)
    monkeypatch.setattr(CppBackend, "step", lambda *given: steps.append(given[1].numel()) or step(*given))
    with FlopCounterMode(display=False) as rollout:
        work = method.collect(WINDOWS, 1).work(WIDE, settings)
    shape = dataclasses.replace(Shape.of(policy.config), attention=())
    thoughts, tails = ([n for some in group for n in some] for group in (work.thoughts, work.tails))
    assert sum(steps) == work.opening * len(thoughts) + sum(thoughts) + sum(tails)
    seen = counted(rollout) - rollout.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    cost = rlp_step(shape, work)
    assert seen == cost.teacher + cost.score - sum(tails) * decode_flops(shape, [(1, 0)])


def test_work_says_what_was_asked_and_read():
    method = rlp(MODELS["qwen3"](), config(group=3, thought_length=4, positions=2, teacher_every=2, horizon=2), LONG)
    first, second, third = (collected(method, WINDOWS, step).work for step in (1, 2, 3))
    assert isinstance(first, Work)
    assert [one.teacher for one in (first, second, third) if isinstance(one, Work)] == [True, True, False]
    assert (first.owners, first.opening, first.horizon) == ((0, 0, 1, 1), 4, 2)
    assert first.windows == tuple(first.prefixes[i] - len(LONG.before) + 1 for i in (1, 3))
    assert all(3 <= prefix <= 7 for prefix in first.prefixes)
    assert first.prefixes[0] < first.prefixes[1]
    assert first.thoughts == ((4,) * 3,) * 4
    assert first.tails == ((3 + 1,) * 3,) * 4
    assert not first.kl
    assert first.inner_steps == 1


def test_a_real_step_of_next_token_training_equals_torchs_count():
    policy = MODELS["qwen3"]()
    policy.set_attn_implementation("eager")
    method, shape = cpt(policy, config(tokens=1)), Shape.of(policy.config)
    batch = collected(method, WINDOWS, 1)
    with FlopCounterMode(display=False) as counter:
        for piece in batch.microbatches:
            method.forward_backward(piece)
    assert isinstance(batch.work, tuple)
    last = 3 * len(WINDOWS) * 2 * shape.hidden * shape.vocab  # logits after each row's last token, which nothing uses
    assert counted(counter) == cpt_step(shape, batch.work, causal=False).total + last


def test_next_token_training_by_hand():
    assert cpt_step(TINY, [5, 2]) == Flops(update=3 * linear(7, 5, 15 + 3))
    assert step_flops(TINY, (5, 2)) == cpt_step(TINY, [5, 2])
    assert step_flops(TINY, WORK) == rlp_step(TINY, WORK)


def test_steps_of_equal_flops():
    one = cpt_step(TINY, [5, 2]).total
    assert [equal_flops_steps(TINY, round(share * one), [5, 2]) for share in (0.1, 1, 7.4, 7.6)] == [1, 1, 7, 8]


def test_the_papers_budget():
    """170M tokens of text in 350 steps of 512 positions with 16 thoughts of 2048 tokens: 6B, 35 times as many."""
    budget = t_flop(16, 2048, 512, 350, 170_000_000)
    assert budget == 6_042_025_600
    assert 35 < budget / 170_000_000 < 36


def go(tmp_path: Path, name: str, **changes: Any) -> dict[str, Any]:
    return train(from_dict(options(tmp_path, name, **changes)))


@pytest.mark.parametrize("name", ["rlp", "rpt", "cpt"])
def test_a_run_reports_what_it_cost(tmp_path: Path, name: str):
    method = {"name": name, "group": 3, "thought_length": 4}
    summary = go(tmp_path, "run", method=method, train={"steps": 3})
    rows = figures(tmp_path / "run")
    costs = [row["cost/flops"] for row in rows]
    assert all(cost > 0 for cost in costs)
    assert [row["cost/flops_total"] for row in rows] == [sum(costs[: i + 1]) for i in range(3)]
    assert summary["flops"] == sum(costs) == summary["flops_rollout"] + summary["flops_update"]
    assert (summary["flops_rollout"] > 0) == (name != "cpt")
    thoughts = 3 * 4 * 4 * 3 if name != "cpt" else 0
    assert summary["t_flop_tokens"] == thoughts + summary["tokens"]


def test_a_resumed_run_goes_on_counting(tmp_path: Path):
    whole = go(tmp_path, "whole", train={"steps": 4})
    go(tmp_path, "run", train={"steps": 2})
    run = tmp_path / "run"
    (run / "summary.json").unlink()
    RunLog.open(run).write_json("config.json", json.loads((tmp_path / "whole" / "config.json").read_text()))
    again = resume(run)
    assert {name: again[name] for name in again if "flop" in name} == {n: whole[n] for n in whole if "flop" in n}
    assert figures(run) == figures(tmp_path / "whole")


def test_a_run_of_an_unknown_architecture_goes_on_without_these_figures(tmp_path: Path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    small = {"n_positions": 128, "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **small}))
    summary = go(tmp_path, "run", model={"path": str(folder)}, train={"steps": 1})
    assert not {name for row in figures(tmp_path / "run") for name in row if name.startswith("cost/")}
    assert "flops" not in summary
    assert summary["t_flop_tokens"] > summary["tokens"]


def floats(value: Any) -> int:
    """Bytes of all tensors of floating-point numbers somewhere in a cache."""
    if torch.is_tensor(value):
        return value.nbytes if value.dtype.is_floating_point else 0
    if isinstance(value, dict):
        return sum(map(floats, value.values()))
    return sum(map(floats, value)) if isinstance(value, list) else 0


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name: str):
    assert Shape.of(CONFIGS[name]).parameters == sum(one.numel() for one in model(name).parameters())


def test_every_family_has_a_model_here():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


def test_other_architectures_are_refused_by_name():
    for other in (gpt2().config, Gemma3Config()):
        with pytest.raises(
            UserError, match=rf"^model_type = '{other.model_type}': its FLOPs are not known; known are bamba"
        ):
            Shape.of(other)
    assert Shape.known(gpt2().config) is None
    assert Shape.known(Gemma3Config()) == Shape.of(Gemma3Config().text_config)  # what is trained is the text model
    assert Shape.known(CONFIGS["llama"]) == Shape.of(CONFIGS["llama"])


def test_windows_follow_the_layers():
    def windows(name: str) -> list[int | None]:
        return [one.window for one in Shape.of(CONFIGS[name]).attention]

    assert windows("llama") == windows("mixtral") == [None, None, None]
    assert windows("mistral") == [5, 5, 5]
    assert windows("qwen2") == windows("qwen3") == [None, None, 5]
    assert windows("gemma2") == windows("gemma3_text") == [5, None, 5]


def test_a_config_without_head_dim_divides_its_width():
    [one, *_] = Shape.of(CONFIGS["smollm3"]).attention
    assert one == Attention(heads=4, kv_heads=2, head_dim=6, window=None)


def test_qwen3_1_7b_by_hand():
    """The published shape: 28 layers of 16 heads of 128 with 8 key heads, 2048 wide, MLP 6144, tied."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    shape = Shape.of(config)
    layer = 2048 * 2048 * 2 + 2048 * 1024 * 2 + 3 * 2048 * 6144
    assert shape.matmul_weights == 28 * layer == 1_409_286_144
    assert shape.parameters == 28 * (layer + 2 * 2048 + 2 * 128) + 151936 * 2048 + 2048 == 1_720_574_976
    assert cache_numbers(shape) == (28 * 2 * 8 * 128, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_numbers_are_those_of_the_tensors(name: str):
    policy, tokens = model(name), 2
    cache = DynamicCache(config=policy.config)
    with torch.no_grad():
        policy(input_ids=torch.ones(1, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    keys, states = cache_numbers(Shape.of(policy.config))
    assert 4 * (keys * tokens + states) == sum(floats(vars(layer)) for layer in cache.layers)
