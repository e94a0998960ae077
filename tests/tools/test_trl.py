"""RLP in an unmodified GRPOTrainer: reward, advantages, loss and gradient equal those of `forethought train`."""

import copy
import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders
from transformers import TrainerCallback
from trl import GRPOTrainer

import forethought
from forethought.algo.metrics import PositionShard, ThoughtRecord
from forethought.algo.objective import group_advantages
from forethought.algo.rewards import Rewards
from forethought.config import Config, Corpus, Method, Model, UserError, from_dict, merge, option_names, to_dict
from forethought.data.corpus import Windows
from forethought.data.positions import draw_positions, make_generator
from forethought.rollout import Thoughts
from forethought.tools import trl
from helpers.models import CLOSE, FORM, assert_close, config, plain_targets, qwen3, read_through, rlp, word_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TEXTS = ("a b c d e f g", "b a d c f e g g", "g f e d c b a a", "c c a b g e", "e f g a b d", "d e b a c f g")


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    small = config(batch=4, group=4, thought_length=9, clip_high=0.3, horizon=2, discount=0.5, ema=0.5)
    return dataclasses.replace(
        small,
        corpus=Corpus(path=str(file), min_tokens=4),
        model=Model(device="cpu"),
        train=dataclasses.replace(small.train, steps=2, checkpoint_every=1, rollout_batch=0),
        optim=dataclasses.replace(small.optim, learning_rate=0.01, gradient_clip=0.0),
    )


def trainer_of(model: Any, settings: Config, folder: Path, **more: Any) -> tuple[GRPOTrainer, trl.InformationGain]:
    """TRL's own trainer, or with a prediction term ours."""
    tokenizer = word_tokenizer()
    rows = trl.prompts(settings, tokenizer)
    reward = trl.InformationGain(model, tokenizer, settings)
    trainer = (trl.RLPTrainer if settings.method.prediction_weight else GRPOTrainer)(
        model=model,
        reward_funcs=reward,
        args=trl.arguments(settings, folder, disable_tqdm=True, **more),
        train_dataset=rows,
        processing_class=trl.stopping_at([CLOSE], tokenizer, model),
        callbacks=[trl.TeacherUpdate(reward)],
    )
    return trainer, reward


def one_step(trainer: GRPOTrainer) -> dict[str, Any]:
    """The inputs of TRL's loss on the first batch: its own thoughts, and what it made of the reward."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize(("weight", "repeat"), [(0.0, 0), (0.5, 0), (0.5, 2)])
def test_reward_advantages_loss_and_gradient_are_those_of_our_trainer(settings, tmp_path, weight, repeat):
    """Our first thought token cannot be the closing delimiter; TRL's loss has no such rule: its logit is -30 there."""
    model = qwen3(scale=0.2, seed=3)
    changed = dataclasses.replace(settings.method, prediction_weight=weight, repeat_context=repeat)
    settings, form = dataclasses.replace(settings, method=changed), dataclasses.replace(FORM, repeat=repeat)
    windows = Windows(settings.corpus, word_tokenizer(), settings.seed)
    text = [next(windows) for _ in range(4)]
    positions = draw_positions(text, settings.method, make_generator(settings.seed, "positions", 1))
    prompts = [FORM.prompt_tokens(context) for context in positions.contexts()]
    with torch.no_grad():
        ends = torch.stack([model.model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts])
        model.lm_head.weight[CLOSE] += torch.linalg.pinv(ends) @ (-30 - ends @ model.lm_head.weight[CLOSE])
    ours = copy.deepcopy(model)
    trainer, _ = trainer_of(model, settings, tmp_path / "run")
    inputs = one_step(trainer)

    read = [row[mask.bool()].tolist() for row, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]
    assert sorted(read) == sorted(prompts * 4)
    order = torch.tensor([[i for i, row in enumerate(read) if row == prompt] for prompt in prompts])
    tokens, mask = inputs["completion_ids"][order], inputs["completion_mask"][order].bool()
    assert 1 < int(mask.sum(-1).min()) < int(mask.sum(-1).max())
    assert (tokens[..., 0] != CLOSE).all()
    closed = (tokens == CLOSE).any(-1)
    assert closed.any() and not closed.all()

    values = []
    truth = positions.targets().tolist()
    for prompt, context, true, group, kept in zip(prompts, positions.contexts(), truth, tokens, mask, strict=True):
        for row, some in zip(group, kept, strict=True):
            thought = row[some].tolist()
            logp = plain_targets(ours, prompt + read_through(thought, form, context), true).detach()
            values.append(float(logp[0] + 0.5 * logp[1]))
    advantages = group_advantages(torch.tensor(values).view(4, 4))
    assert advantages.abs().max() > 0.05
    assert torch.allclose(inputs["advantages"][order], advantages, atol=1e-5)

    method = rlp(ours, settings, form)
    sampled = Thoughts(
        tokens=tokens,
        mask=mask,
        closed=closed,
        logp=torch.zeros(mask.shape),
        evidence=torch.zeros(4, 4, 1),
        hit=torch.zeros(4, 4, 1, dtype=torch.bool),
    )
    shard = PositionShard(positions=positions, global_indices=list(range(len(positions))), global_count=len(positions))
    record = ThoughtRecord(
        shard=shard,
        thoughts=sampled,
        sampled=sampled,
        no_think_logp=None,
        rewards=Rewards(value=torch.tensor(values).view(4, 4), shift=None),
        advantages=advantages,
        kept=torch.ones_like(closed),
    )
    (piece,) = method.microbatches(record)
    loss, _ = method.forward_backward(piece)
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    assert loss == pytest.approx(float(theirs.detach()), abs=1e-6)
    assert_close(
        [parameter.grad for parameter in trainer.model.parameters()],
        [parameter.grad for parameter in ours.parameters()],
        5e-5,  # TRL numbers positions from the padding on
    )


def test_a_warm_up_trains_only_the_prediction_term(settings, tmp_path):
    method = dataclasses.replace(settings.method, prediction_weight=0.5, warmup_steps=1)
    trainer, _ = trainer_of(qwen3(scale=0.2), dataclasses.replace(settings, method=method), tmp_path / "run")
    assert not one_step(trainer)["advantages"].any()
    trainer.state.global_step = 1
    assert one_step(trainer)["advantages"].any()


def test_the_prediction_term_needs_its_trainer(settings, tmp_path):
    model, tokenizer = qwen3(scale=0.2), word_tokenizer()
    settings = dataclasses.replace(settings, method=dataclasses.replace(settings.method, prediction_weight=0.5))
    reward = trl.InformationGain(model, tokenizer, settings)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.arguments(settings, tmp_path / "run", disable_tqdm=True),
        train_dataset=trl.prompts(settings, tokenizer),
        processing_class=trl.stopping_at([CLOSE], tokenizer, model),
        callbacks=[trl.TeacherUpdate(reward)],
    )
    with pytest.raises(UserError, match="needs an RLPTrainer"):
        trainer.train()


class Remember(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(kwargs["model"].lm_head.weight.detach().clone())


def test_the_teacher_follows_each_step_and_resumes(settings, tmp_path):
    model = qwen3(scale=0.2)
    start = model.lm_head.weight.detach().clone()
    trainer, reward = trainer_of(model, settings, tmp_path / "run")
    trainer.add_callback(memory := Remember())
    trainer.train()
    first, second = memory.seen
    assert not torch.equal(start, first) and not torch.equal(first, second)
    expected = 0.25 * start + 0.25 * first + 0.5 * second
    assert torch.allclose(reward.teacher.model.lm_head.weight, expected, atol=1e-6)
    gains = [line for line in trainer.state.log_history if "gain" in line]
    assert [line["step"] for line in gains] == [1, 2]
    assert all(line["reward"] == pytest.approx(4 / 3 * line["gain"], rel=1e-3) for line in gains)

    again, fresh = trainer_of(qwen3(scale=0.2), settings, tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert again.state.global_step == 2
    assert torch.allclose(fresh.teacher.model.lm_head.weight, expected, atol=1e-3)
    assert not torch.allclose(fresh.teacher.model.lm_head.weight, 0.5 * start + 0.5 * second, atol=1e-3)


def test_gradient_accumulation_keeps_the_batch(settings, tmp_path):
    whole = trl.arguments(settings, tmp_path)
    split = trl.arguments(settings, tmp_path, gradient_accumulation_steps=4)
    assert (whole.per_device_train_batch_size, split.per_device_train_batch_size) == (16, 4)
    assert whole.generation_batch_size == split.generation_batch_size == 16


def test_prompts_are_the_positions_of_our_trainer(settings):
    method, windows = rlp(qwen3(), settings), Windows(settings.corpus, word_tokenizer(), settings.seed)
    wanted = []
    for step in (1, 2):
        positions = method.position_sampler.draw([next(windows) for _ in range(4)], step)
        wanted += zip(positions.contexts(), positions.targets().tolist(), strict=True)
    rows = trl.prompts(settings, word_tokenizer())
    assert [(row["context"], row["target"]) for row in rows] == wanted


def test_positions_whose_text_does_not_tokenize_back_are_skipped():
    """The embedded tokenizer puts a token before every text, so no window but a document's first is a prompt."""
    words = ["--train.steps", "3", "--train.batch", "8", "--corpus.window", "16", "--model.device", "cpu"]
    quick = forethought.load("quickstart", words)
    tokenizer = forethought.load_tokenizer(quick.model)
    rows = trl.prompts(quick, tokenizer)
    assert len(rows) == 24
    for row in rows:
        assert row["context"][0] == tokenizer.bos_token_id
        assert tokenizer(row["prompt"])["input_ids"] == [*row["context"], *tokenizer.encode("<think>")[1:]]


def test_a_corpus_whose_text_does_not_tokenize_back_is_refused(settings):
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    with pytest.raises(UserError, match="does not tokenize back to the same tokens"):
        trl.prompts(settings, tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"close": "</think> a"}, "is 2 tokens of this tokenizer"),
        ({"inner_steps": 2}, "method.inner_steps = 2: must be 1 with TRL"),
        ({"unclosed": "drop"}, "method.unclosed = 'drop'"),
        ({"kl_weight": 0.1}, "method.kl_weight"),
        ({"baseline": "batch"}, "method.baseline"),
        ({"name": "rpt"}, "method.name = 'rpt'"),
        ({"reward": "random"}, "method.reward = .random.: must be .information_gain."),
        ({"position_policy": "entropy"}, "position_policy = 'entropy'"),
    ],
)
def test_what_trl_cannot_do_is_refused(options, message):
    settings = Config(method=Method(group=4, **options))
    with pytest.raises(UserError, match=message):
        trl.InformationGain(qwen3(), word_tokenizer(), settings)


HONORED = (
    "seed", "model.path", "model.tokenizer", "model.init", "model.precision", "model.device", "corpus.",
    "method.group", "method.thought_length", "method.positions", "method.position_policy", "method.marked_share",
    "method.horizon", "method.discount", "method.temperature", "method.top_p", "method.reward", "method.clip_low",
    "method.clip_high", "method.ema", "method.freeze_teacher", "method.prediction_weight", "method.warmup_steps",
    "method.allow_empty", "method.min_thought_length", "method.repeat_context", "method.open", "method.close",
    "method.prompt", "optim.",
    "train.steps", "train.batch", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints",
    "update.tokens_per_chunk", "update.checkpointing",
)  # fmt: skip
"""Options that the prompts, the reward, the teacher or TRL's arguments follow; values that they cannot are refused."""
ELSEWHERE = ("run", "overwrite", "evaluate.", "questions.")
"""How the names of options begin that are another command's."""
OTHERS = {
    "method.name": "cpt", "method.baseline": "batch", "method.scale": "std", "method.clamp_gain": True,
    "method.length_norm": "none", "method.distillation": 0.5,
    "method.min_gain": 0.0, "method.unclosed": "drop", "rollout.engine": "vllm", "rollout.precision": "bf16",
    "train.tracker": "wandb",
    "parallel.shard": "zero1",
}  # fmt: skip


@pytest.mark.parametrize("option", option_names())
def test_every_option_is_honored_refused_or_of_something_else(option: str):
    kinds = [option in trl.FIXED, option in trl.UNUSED, option.startswith((*ELSEWHERE, *HONORED))]
    assert sum(kinds) == 1
    if option in trl.FIXED:
        section, _, name = option.partition(".")
        part = getattr(Config(), section)
        value = OTHERS[option] if option in OTHERS else getattr(part, name) + 2
        changed = dataclasses.replace(part, **{name: value})
        with pytest.raises(UserError, match=f"{option} = .*: must be .* with TRL; use forethought train"):
            trl.check(dataclasses.replace(Config(), **{section: changed}), FORM)


def with_option(config: Config, option: str, value: Any) -> Config:
    section, _, name = option.rpartition(".")
    return from_dict(merge(to_dict(config), {section: {name: value}} if section else {name: value}))


ARGUMENTS = {
    "seed": ("seed", 5), "model.precision": ("bf16", "bf16"), "method.group": ("num_generations", 8),
    "method.thought_length": ("max_completion_length", 7), "method.temperature": ("temperature", 0.9),
    "method.top_p": ("top_p", 0.8), "method.clip_low": ("epsilon", 0.1), "method.clip_high": ("epsilon_high", 0.4),
    "optim.learning_rate": ("learning_rate", 0.1), "optim.schedule": ("lr_scheduler_type", "cosine"),
    "optim.warmup": ("warmup_steps", 3), "optim.weight_decay": ("weight_decay", 0.2),
    "optim.beta1": ("adam_beta1", 0.8),
    "optim.beta2": ("adam_beta2", 0.9), "optim.gradient_clip": ("max_grad_norm", 2.0), "train.steps": ("max_steps", 7),
    "train.batch": ("per_device_train_batch_size", 8), "train.log_every": ("logging_steps", 3),
    "train.checkpoint_every": ("save_steps", 5), "train.keep_checkpoints": ("save_total_limit", 4),
    "update.checkpointing": ("gradient_checkpointing", True),
}  # fmt: skip
"""The honored options that TRL's own arguments carry: the argument, and another value than that of `settings`."""
CARRIED = {"model.precision": True, "train.batch": 32}
"""What the argument is where it is not the option's value."""


@pytest.mark.parametrize("option", ARGUMENTS)
def test_every_option_of_trls_arguments_arrives_there(settings: Config, tmp_path: Path, option: str):
    argument, value = ARGUMENTS[option]
    changed, plain = (trl.arguments(one, tmp_path) for one in (with_option(settings, option, value), settings))
    assert getattr(changed, argument) == CARRIED.get(option, value) != getattr(plain, argument)


@pytest.mark.parametrize(("option", "value", "shortest"), [("min_thought_length", 3, 3), ("allow_empty", True, 0)])
def test_the_minimum_length_arrives_in_trls_sampler(
    settings: Config, tmp_path: Path, option: str, value: Any, shortest: int
):
    changed, plain = (
        trl.arguments(one, tmp_path) for one in (with_option(settings, f"method.{option}", value), settings)
    )
    assert (changed.generation_kwargs, plain.generation_kwargs) == (
        {"min_new_tokens": shortest},
        {"min_new_tokens": 1},
    )


def test_no_option_of_the_optimizer_is_left_out():
    assert {name for name in option_names() if name.startswith("optim.")} <= ARGUMENTS.keys()


PROMPTS = {
    "seed": 5, "corpus.field": "other", "corpus.min_tokens": 8, "corpus.window": 5, "corpus.shuffle": 2,
    "method.positions": 2, "method.horizon": 3, "method.position_policy": "marked",
}  # fmt: skip


@pytest.mark.parametrize("option", PROMPTS)
def test_every_option_of_the_positions_changes_the_prompts(settings: Config, tmp_path: Path, option: str):
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    rows = [{**row, "other": row["text"][::-1], "marks": {"answer": [4]}} for row in rows]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = with_option(settings, option, PROMPTS[option])
    drawn, plain = (trl.prompts(one, word_tokenizer()).to_list() for one in (changed, settings))
    assert drawn != plain


def test_options_that_trl_does_not_use_are_said_in_one_line(settings: Config, tmp_path: Path):
    trl.arguments(settings, tmp_path)  # warnings are errors
    changed = with_option(with_option(settings, "train.rollout_batch", 9), "model.prefix", "replicated")
    said = "options that change nothing with TRL: model.prefix = 'replicated', train.rollout_batch = 9"
    with pytest.warns(UserWarning, match=f"^{said}$"):
        trl.arguments(changed, tmp_path)


def test_arguments_that_make_another_method_are_refused(settings, tmp_path):
    for name, value in {"beta": 0.1, "loss_type": "dapo", "use_vllm": True, "gradient_accumulation_steps": 3}.items():
        with pytest.raises(UserError, match=name):
            trl.arguments(settings, tmp_path, **{name: value})


def test_weights_in_bf16_and_patched_or_other_models_are_refused(settings, tmp_path):
    with pytest.raises(UserError, match="must be fp32"):
        trl.InformationGain(qwen3().bfloat16(), word_tokenizer(), settings)
    trainer, reward = trainer_of(qwen3(), settings, tmp_path)
    with pytest.raises(UserError, match="create the reward before the trainer"):
        trl.InformationGain(trainer.model, word_tokenizer(), settings)
    reward.policy = qwen3()
    with pytest.raises(UserError, match="have different models"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:options that change nothing with TRL. train.rollout_batch")
def test_the_example_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["trl_rlp.py", "--train.steps", "1", "--train.batch", "4", "--model.device", "cpu"]
    )
    file = Path(__file__).parents[2] / "examples" / "trl_rlp.py"
    runpy.run_path(str(file), run_name="__main__")
    said = capsys.readouterr().out
    assert "step   1: information gain" in said
    assert "runs/trl/policy: " in said
    saved = json.loads((tmp_path / "runs/trl/policy/config.json").read_text())
    assert saved["eos_token_id"] is None
    assert json.loads((tmp_path / "runs/trl/policy/forethought.json").read_text())["method"]["thought_length"] > 0
    assert len(file.read_text().splitlines()) <= 36
