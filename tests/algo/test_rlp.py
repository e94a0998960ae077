import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from forethought.algo.policy_gradient import Microbatch
from forethought.data.positions import ThoughtFormat, draw_positions, make_generator, pad_rows
from forethought.models.compute_copy import Network
from forethought.rollout import thought_tokens
from helpers.models import (
    CLOSE,
    FORM,
    LONG,
    OPEN,
    WINDOWS,
    WORDS,
    assert_close,
    collected,
    config,
    cpt,
    gradients,
    plain_targets,
    plain_thought,
    qwen3,
    rlp,
    update,
    window,
    written,
)

MORE = [*WINDOWS, window(5, 5, 8, 9, 10), window(7, 6, 5), window(10, 11, 6, 5), window(8, 6, 8, 8, 8, 8)]
BOTH = pytest.mark.parametrize("prefix", ["shared", "replicated"])


def reinforce(
    model: Any, pieces: Sequence[Microbatch], form: ThoughtFormat, temperature: float, close: int
) -> torch.Tensor:
    """-(1/rows) sum_i A_i (1/|c_i|) sum_u log pi(l_u), each row by one plain forward without padding."""
    total, rows = torch.zeros(()), 0
    for piece in pieces:
        for advantage, (prompt, thought) in zip(piece.advantage, written(piece, form), strict=True):
            total = total - advantage * plain_thought(model, prompt, thought, temperature, close).mean()
            rows += 1
    return total / rows


@pytest.mark.parametrize("form", [FORM, LONG], ids=["short", "long"])
@pytest.mark.parametrize("tokens", [0, 40, 1])
@BOTH
def test_gradient_at_ratio_one_is_length_normalised_reinforce(form, tokens, prefix):
    model = qwen3(scale=0.2)
    method = rlp(model, config(tokens=tokens, prefix=prefix, thought_length=9, positions=2), form)
    pieces = collected(method, WINDOWS, step=1).microbatches
    lengths = torch.cat([piece.batch.mask.sum(-1) for piece in pieces])
    assert lengths.min() < lengths.max() == 9 or form is LONG
    assert len(lengths) == 32
    assert_close(update(method, pieces), gradients(model, reinforce(model, pieces, form, 0.7, CLOSE)))


@pytest.mark.parametrize(("inner", "cap", "factor"), [(1, 4.0, 2.0), (2, 4.0, 2.0), (1, 1.5, 1.5), (1, 0.0, 1.0)])
def test_a_sampler_that_is_not_the_policy_is_weighed_up_to_the_cap(inner: int, cap: float, factor: float):
    """One that gave each token half the policy's probability."""
    model = qwen3(scale=0.2)
    settings = config(thought_length=6, inner_steps=inner)
    pieces = collected(rlp(model, settings), WINDOWS, step=1).microbatches
    half = [dataclasses.replace(piece, logp_sampler=piece.logp_sampler - math.log(2)) for piece in pieces]
    corrected = dataclasses.replace(settings, rollout=dataclasses.replace(settings.rollout, importance_cap=cap))
    wanted = [factor * one for one in update(rlp(model, settings), pieces)]
    method = rlp(model, corrected)
    assert_close(update(method, half), wanted)
    value, tokens = method.forward_backward(half[0])[1].get("objective/importance_weight", (0.0, 1))
    assert value / tokens == pytest.approx(factor if cap else 0.0, rel=1e-5)


def test_inner_steps_keep_the_log_probabilities_of_before():
    model = qwen3(scale=0.2)
    method = rlp(model, config(inner_steps=2, clip_low=1.0, clip_high=100.0))
    (piece,) = collected(method, WINDOWS, step=1).microbatches
    (single,) = collected(rlp(model, config()), WINDOWS, step=1).microbatches
    assert single.logp_old is None
    assert_close(update(method, [piece]), update(rlp(model, config()), [single]))
    piece = dataclasses.replace(piece, advantage=torch.linspace(-2, 3, 16) ** 3)
    before = method.forward_backward(piece)[0]
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    loss, sums = method.forward_backward(piece)
    logp = [plain_thought(model, prompt, thought, 0.7, CLOSE).detach() for prompt, thought in written(piece)]
    ratios = [(new - old[: len(new)]).exp() for new, old in zip(logp, piece.logp_sampler, strict=True)]
    wanted = -sum(float(a * r.mean()) for a, r in zip(piece.advantage, ratios, strict=True)) / len(ratios)
    assert loss == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted - before) > 1e-2
    ratio_sum, tokens = sums["objective/ratio"]
    assert ratio_sum / tokens == pytest.approx(float(torch.cat(ratios).mean()), abs=1e-5)


@pytest.mark.parametrize("form", [FORM, LONG], ids=["short", "long"])
@BOTH
def test_no_gradient_reaches_logits_outside_sampled_tokens(form, prefix):
    """Caught behind the head, at logits, and behind the last layer, at every token that is read."""
    model = qwen3(scale=0.2)
    method = rlp(model, config(prefix=prefix, thought_length=9), form)
    (piece,) = collected(method, WINDOWS, step=1).microbatches
    mask = piece.batch.mask
    used = mask & (piece.advantage != 0)[:, None]
    assert not mask.all() or form is LONG
    caught: dict[str, list[torch.Tensor]] = {"head": [], "last": []}

    def catch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            output.register_hook(caught[name].append)

        return hook

    handles = [
        model.lm_head.register_forward_hook(catch("head")),
        model.model.norm.register_forward_hook(catch("last")),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forethought.models.logprobs._BUCKET", 100)  # all rows in one chunk, in their order
        method.forward_backward(piece)
    for handle in handles:
        handle.remove()
    (logits,), (hidden,) = caught["head"], caught["last"]
    assert torch.equal((logits.flatten(0, -2) != 0).any(dim=-1), used[mask])
    first = torch.zeros_like(mask)
    first[:, 0] = True
    assert not logits.flatten(0, -2)[first[mask], CLOSE].any()
    columns = (hidden != 0).any(dim=-1)
    assert torch.equal(columns[:, -mask.shape[1] - 1 : -1], used)
    assert not columns[:, -1].any()
    assert not columns[:, : -mask.shape[1] - 1].any()


def test_nothing_that_is_collected_carries_a_gradient():
    method = rlp(qwen3(), config(inner_steps=2, kl_weight=0.1))
    assert method.teacher is not None
    thoughts = method.engine.sample(
        draw_positions(WINDOWS, method.config.method, make_generator(0)), torch.rand(4, 2, 3)
    )
    nothink = method.teacher_scores(draw_positions(WINDOWS, method.config.method, make_generator(0)), step=1)[0]
    (piece,) = collected(method, WINDOWS, step=1).microbatches
    assert nothink is not None and piece.logp_old is not None and piece.logp_reference is not None
    tensors = [nothink, thoughts.evidence, thoughts.logp, piece.logp_old, piece.logp_reference]
    tensors += [piece.logp_sampler, piece.advantage]
    assert not any(tensor.requires_grad for tensor in tensors)


@BOTH
def test_targets_and_forced_delimiters_are_not_even_read(prefix):
    """Their embeddings get exactly no gradient, while those of contexts and thoughts do."""
    model = qwen3()
    with torch.no_grad():
        model.lm_head.weight[11] = model.lm_head.weight[CLOSE] = 0.0
        model.lm_head.weight[5] *= 4
    method = rlp(model, config(prefix=prefix, thought_length=3, horizon=1))
    (piece,) = collected(method, [window(5, 11), window(6, 11)], step=1).microbatches
    rows = written(piece)
    assert all(CLOSE not in thought[:-1] for _, thought in rows)
    read = {token for prompt, thought in rows for token in [*prompt, *thought[:-1]]}
    slope = dict(zip([n for n, _ in model.named_parameters()], update(method, [piece]), strict=True))
    sizes = slope["model.embed_tokens.weight"].abs().sum(-1)
    assert {token for token, size in enumerate(sizes.tolist()) if size > 0} == read
    assert 11 not in read
    assert OPEN in read


def test_equal_rewards_give_exactly_no_gradient():
    """If any gradient went through the score of the target, it would show here."""
    model = qwen3()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)  # the thought is ignored, so all rewards are the same
    method = rlp(model, config(thought_length=3))
    batch = collected(method, WINDOWS, step=1)
    assert not any(slope.any() for slope in update(method, batch.microbatches))
    rewards = [member["reward"] for member in batch.rows[0]["thoughts"]]
    assert max(rewards) - min(rewards) == 0
    assert abs(rewards[0]) > 0.001 or batch.metrics["reward/gain"][0] == 0


@pytest.mark.parametrize("clamp", [False, True], ids=["as it is", "clamped"])
def test_the_teacher_cancels_to_the_bit(clamp):
    """One step with each of two teachers that have nothing in common; a clamp is what makes them matter."""
    results, gains = [], []
    for seed in (1, 2):
        model = qwen3()
        method = rlp(model, config(clamp_gain=clamp, group=6))
        assert method.teacher is not None
        method.teacher.model = qwen3(seed=seed, scale=0.5).requires_grad_(False)
        batch = collected(method, WINDOWS, step=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for piece in batch.microbatches:
            method.forward_backward(piece)
        slopes = [parameter.grad for parameter in model.parameters()]
        optimizer.step()
        results.append([*slopes, *(parameter.detach() for parameter in model.parameters())])
        gains.append(batch.metrics["reward/gain"][0])
    assert abs(gains[0] - gains[1]) > 1
    equal = [torch.equal(one, other) for one, other in zip(*results, strict=True)]
    assert all(equal) != clamp


@pytest.mark.parametrize(("every", "step", "asked"), [(0, 1, False), (3, 1, True), (3, 3, True), (3, 4, False)])
def test_a_teacher_that_is_asked_less_often_changes_nothing(every, step, asked):
    model = qwen3()
    slopes = []
    for often in (1, every):
        method = rlp(model, config(teacher_every=often))
        batch = collected(method, WINDOWS, step)
        assert ("reward/gain" in batch.metrics) == (often == 1 or asked)
        slopes.append(update(method, batch.microbatches))
    assert all(torch.equal(one, other) for one, other in zip(*slopes, strict=True))


def test_leakage_counts_only_targets_that_have_a_text():
    empty = 10
    blank = tuple(" " if token == empty else word for token, word in enumerate(WORDS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({w: i for i, w in enumerate(blank)})))
    record = rlp(qwen3(), config(group=4)).collect(WINDOWS, 1)
    targets = record.shard.positions.targets()[:, 0].tolist()
    said = thought_tokens(record.thoughts, FORM)
    shares = [
        sum(blank[target] in " ".join(blank[token] for token in one) for one in group) / 4
        for target, group in zip(targets, said, strict=True)
        if target != empty
    ]
    assert 0 < len(shares) < len(targets) and sum(shares) > 0
    assert record.text(tokenizer, FORM, 0)[0]["rollout/leakage"] == (sum(shares), len(shares))


@pytest.mark.parametrize("positions", [1, 2])
def test_rlp_chunks_and_copied_prefixes_change_nothing(positions):
    """8 pieces of 1 window = 4 of 2 = 1 of 8, in chunks of any size, over prefixes that are shared or not."""
    model, results, counts, thoughts = qwen3(scale=0.1), [], [], []
    for prefix in ("replicated", "shared"):
        for tokens, rows in ((1, 64), (20, 4), (56, 16), (0, 64)):
            settings = config(tokens=tokens, rows=rows, prefix=prefix, positions=positions, thought_length=9)
            method = rlp(model, settings)
            batch = collected(method, MORE, step=1)
            counts.append(len(batch.microbatches))
            thoughts.append([row for piece in batch.microbatches for row in written(piece)])
            results.append(update(method, batch.microbatches))
    assert counts == [8, 4, 1, 1] * 2
    assert len(thoughts[0]) == 32 * positions
    for one, said in zip(results[:-1], thoughts[:-1], strict=True):
        assert said == thoughts[-1]
        assert_close(one, results[-1])


def test_cpt_chunks_change_nothing_and_the_mean_is_over_all_tokens():
    model, results, counts = qwen3(scale=0.1), [], []
    text = [*WINDOWS, window(5, OPEN, 8, 9, 10), *MORE[5:]]
    for prefix in ("replicated", "shared"):
        for tokens in (1, 14, 28, 56, 0):
            method = cpt(model, config(tokens=tokens, prefix=prefix))
            pieces = collected(method, text, step=1).microbatches
            counts.append(len(pieces))
            results.append(update(method, pieces))
    assert counts == [8, 4, 2, 1, 1] * 2
    for one in results[:-1]:
        assert_close(one, results[-1])
    total, tokens = torch.zeros(()), 0
    for one in text:
        logp = plain_targets(model, one.tokens[:1], one.tokens[1:])
        learned = torch.tensor(one.tokens[1:]) != OPEN
        total, tokens = total - logp[learned].sum(), tokens + int(learned.sum())
    assert_close(results[-1], gradients(model, total / tokens))


def test_cpt_never_learns_the_opening_delimiter():
    text = [window(7, 8, OPEN, 5, 6, 9, CLOSE, 10), window(OPEN, 5, 6, 5, OPEN, 5), window(5, 6)]
    (piece,) = collected(cpt(qwen3(), config()), text, step=1).microbatches
    assert piece.learned.tolist() == [
        [True, False, True, True, True, True, True],
        [True, True, True, False, True, False, False],
        [True, False, False, False, False, False, False],
    ]
    (piece,) = collected(
        cpt(qwen3(), config(), LONG), text, step=1
    ).microbatches  # opens with three tokens: <think> a b
    assert piece.learned.tolist() == [
        [True, False, False, False, True, True, True],
        [False, False, True, True, True, False, False],
        [True, False, False, False, False, False, False],
    ]
    (short,) = collected(cpt(qwen3(), config(), LONG), text[2:], step=1).microbatches
    assert short.learned.tolist() == [[True]]


def test_nothing_of_the_template_reaches_the_score_without_thinking():
    """The no-think score of a step is the same whatever surrounds a thought, and that of a plain forward."""
    model, text, sums = qwen3(), [window(5, 6), window(8, 9), window(9, 10)], []
    for form in (FORM, LONG):
        method = rlp(model, config(), form)
        assert method.teacher is not None
        batch = collected(method, text, step=1)
        total, count = batch.metrics["reward/nothink"]
        sums.append(total / count)
        assert form.prompt_tokens([5]) == written(batch.microbatches[0], form)[0][0]
    plain = [float(plain_targets(model, one.tokens[:1], one.tokens[1:]).detach()) for one in text]
    assert sums == [pytest.approx(sum(plain) / 3, abs=1e-5)] * 2


def test_kl_weight_adds_the_divergence_from_the_start():
    model = qwen3(scale=0.2)
    method = rlp(model, config(kl_weight=0.5))
    assert method.reference is not None
    (piece,) = collected(method, WINDOWS, step=1).microbatches
    plain = dataclasses.replace(piece, advantage=torch.zeros_like(piece.advantage))
    assert method.forward_backward(plain)[0] == 0
    with torch.no_grad():
        model.lm_head.weight.mul_(1.2)
    loss, sums = method.forward_backward(plain)
    kl = []
    for prompt, thought in written(piece):
        d = plain_thought(method.reference, prompt, thought, 0.7, CLOSE) - plain_thought(
            model, prompt, thought, 0.7, CLOSE
        )
        kl.append((d.exp() - d - 1).mean())
    wanted = torch.stack(kl)
    assert loss == pytest.approx(0.5 * float(wanted.detach().mean()), rel=1e-4)
    assert sums["objective/kl"] == (pytest.approx(float(wanted.detach().sum()), rel=1e-4), len(wanted))
    slopes = update(method, [plain])
    assert any(slope.any() for slope in slopes)
    assert_close(slopes, gradients(model, 0.5 * wanted.mean()), 1e-4)
    assert not any(parameter.requires_grad for parameter in method.reference.parameters())


def test_thoughts_that_are_dropped_have_no_divergence_from_the_start_either():
    model = qwen3(scale=0.2)
    method = rlp(model, config(kl_weight=0.5, unclosed="drop", thought_length=3))
    pieces, kept = collected(method, WINDOWS, step=1).microbatches, []
    with torch.no_grad():
        model.lm_head.weight.mul_(1.2)
    pieces = [dataclasses.replace(one, advantage=torch.zeros_like(one.advantage)) for one in pieces]
    thoughts = [one for piece in pieces for one in written(piece)]
    for prompt, thought in thoughts:
        if thought[-1] == CLOSE:
            ours, theirs = (plain_thought(one, prompt, thought, 0.7, CLOSE) for one in (model, method.reference))
            kept.append(((theirs - ours).exp() - (theirs - ours) - 1).mean())
    assert 0 < len(kept) < len(thoughts)
    assert_close(update(method, pieces), gradients(model, 0.5 * torch.stack(kept).sum() / len(thoughts)), 1e-4)


def test_after_a_step_the_teacher_follows():
    model = qwen3()
    method = rlp(model, config(ema=0.5))
    assert method.teacher is not None
    before = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    method.after_step()
    assert torch.allclose(method.teacher.model.lm_head.weight, before + 0.5, atol=1e-6)
    assert set(method.state()) == {"teacher"}
    assert set(rlp(model, config(teacher_every=0, kl_weight=0.1)).state()) == {"reference"}


def trl_loss(model: Any, piece: Microbatch, temperature: float, folder: Any) -> Any:
    """The loss that TRL's GRPOTrainer computes on the same thoughts, and the copy of the model that it did it with."""
    import copy

    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from helpers.models import word_tokenizer

    arguments = GRPOConfig(
        output_dir=str(folder),
        loss_type="grpo",
        scale_rewards="none",
        beta=0.0,
        num_iterations=1,
        epsilon=0.2,
        epsilon_high=0.3,
        temperature=temperature,
        num_generations=2,
        per_device_train_batch_size=len(piece.advantage),
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=copy.deepcopy(model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * len(piece.advantage)),
        processing_class=word_tokenizer(),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    prompts, mask = pad_rows([prompt for prompt, _ in written(piece)], 0, left=True)
    assert not mask.all()
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": mask.long(),
        "completion_ids": piece.batch.tokens,
        "completion_mask": piece.batch.mask.long(),
        "advantages": piece.advantage,
        "old_per_token_logps": piece.logp_old,
    }
    return trainer._compute_loss(trainer.model, inputs), trainer.model


@pytest.mark.parametrize("moved", [0.0, 0.4], ids=["ratio 1", "ratios off 1"])
@pytest.mark.parametrize("group", [2, 4])
def test_loss_is_that_of_trl(group, moved, tmp_path):
    """TRL's GRPO, an independent implementation, gives the same loss and the same gradients.

    Our first thought token cannot be the closing delimiter; TRL knows no such rule. Here the closing token has a logit
    of -60 at the end of every prompt, where the rule makes no difference.
    """
    model, temperature = qwen3(scale=0.2), 0.7
    settings = config(group=group, thought_length=9, temperature=temperature, clip_high=0.3, inner_steps=2)
    method = rlp(model, settings)
    prompts = [FORM.prompt_tokens(one.tokens[:t]) for one in WINDOWS for t in range(1, len(one.tokens))]
    with torch.no_grad():
        ends = torch.stack([model.model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts])
        model.lm_head.weight[CLOSE] = torch.linalg.pinv(ends) @ torch.full((len(prompts),), -60.0)
    (piece,) = collected(method, WINDOWS, step=1).microbatches
    assert piece.logp_old is not None
    noise = torch.randn(piece.logp_old.shape, generator=torch.Generator().manual_seed(0))
    piece = dataclasses.replace(piece, logp_old=piece.logp_old + moved * noise * piece.batch.mask)
    ours, sums = method.forward_backward(piece)
    assert (sums["objective/clip_fraction"][0] > 3) == (moved > 0)
    theirs, copied = trl_loss(model, piece, temperature, tmp_path)
    assert ours == pytest.approx(float(theirs.detach()), abs=1e-6)
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert_close(update(method, [piece]), gradients(copied, theirs), 5e-5)  # TRL numbers positions from the padding on


def test_thoughts_are_described_in_words():
    method = rlp(qwen3(), config(), ThoughtFormat(before=(), after=(), open=(OPEN,), close=(CLOSE,), bos=None, pad=0))
    batch = collected(method, [window(5, 6), window(8, 9), window(9, 10)], step=4)
    assert [(row["number"], row["context"], row["target"]) for row in batch.rows] == [
        (0, "a", "b"),
        (1, "d", "e"),
    ]
    members = batch.rows[0]["thoughts"]
    assert len(members) == 4
    for member in members:
        assert len(member["text"].split()) == member["length"]
        assert member["reward"] == pytest.approx(member["evidence"] - batch.rows[0]["nothink"], abs=1e-6)
    assert sum(member["advantage"] for member in members) == pytest.approx(0, abs=1e-5)


def test_the_start_takes_the_place_of_the_policy_once_a_step(monkeypatch: pytest.MonkeyPatch):
    """And not for each chunk: with bf16 or adapters all weights are copied, there and back."""
    options = config(kl_weight=0.5, positions=1)
    options = dataclasses.replace(options, update=dataclasses.replace(options.update, tokens_per_chunk=1))
    method, swaps = rlp(qwen3(), options), []
    swapped = Network.swapped_weights
    monkeypatch.setattr(Network, "swapped_weights", lambda self, other: swaps.append(other) or swapped(self, other))
    assert len(collected(method, WINDOWS, step=1).microbatches) == len(WINDOWS) > 1
    assert [one is method.reference for one in swaps].count(True) == 1
