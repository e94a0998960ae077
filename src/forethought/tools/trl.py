"""RLP inside TRL: an unmodified `GRPOTrainer` whose reward is the information gain (docs/trl.md).

    trainer = GRPOTrainer(**parts(config, "runs/trl"))

The same objective as `forethought.algo.RLP`: thoughts at the same positions, rewards of the exact tokens that were
sampled, A_i = G/(G-1) (r_i - mean r), and TRL's clipped surrogate with 1/|c| inside each thought.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model as save_tensors
from torch import Tensor
from transformers import TrainerCallback

from forethought.algo.rewards import discounted
from forethought.config import Config, Optim, UserError
from forethought.data.corpus import Windows
from forethought.data.positions import ThoughtFormat, draw_positions, make_generator, pad_rows, thought_format
from forethought.models.compute_copy import Teacher
from forethought.models.loading import check_context_length, device, load_model, load_tokenizer
from forethought.models.logprobs import chunk_tokens, forward, log_probabilities

try:
    from datasets import Dataset
    from trl import GRPOConfig
except ModuleNotFoundError as error:
    raise UserError("TRL is not installed; install it with: pip install 'forethought[trl]'") from error

PATIENCE = 20
"""Positions that may be left out for each one that is kept, before a corpus is refused."""


def parts(config: Config, folder: str | Path, **more: Any) -> dict[str, Any]:
    """All that `GRPOTrainer(**parts(config, folder))` takes to train RLP with the options of a run.

    Loads the model and its tokenizer, draws the prompts of all steps, and makes the reward, the teacher's callback and
    the `GRPOConfig`; `more` goes to `arguments`. Raises UserError for options that TRL cannot follow.
    """
    tokenizer = load_tokenizer(config.model)
    form = thought_format(tokenizer, config.method)
    check(config, form)
    check_context_length(config, form)
    model = load_model(config.model, config.seed)
    rows = prompts(config, tokenizer)
    reward = InformationGain(model, tokenizer, config)
    return {
        "model": model,
        "reward_funcs": reward,
        "args": arguments(config, folder, **more),
        "train_dataset": rows,
        "processing_class": ending_with(form.close[0], tokenizer, model),
        "callbacks": [TeacherFollows(reward)],
    }


def check(config: Config, form: ThoughtFormat) -> None:
    """Refuse what TRL's GRPO would do otherwise than the method says. Raises UserError."""
    method = config.method
    wanted = {
        "name": "rlp",
        "inner_steps": 1,
        "baseline": "group",
        "scale": "none",
        "reward": "information_gain",
        "clamp_gain": False,
        "min_gain": -math.inf,
        "kl_weight": 0.0,
        "unclosed": "score",
        "teacher_every": 1,
    }
    for option, value in wanted.items():
        if (found := getattr(method, option)) != value:
            raise UserError(f"method.{option} = {found!r}: within TRL it must be {value!r}; use forethought train")
    if method.policy == "entropy":
        raise UserError("method.position_policy = 'entropy': within TRL prompts are drawn before training, without one")
    if len(form.close) > 1:
        raise UserError(
            f"method.close = {method.close!r}: is {len(form.close)} tokens of this tokenizer, and TRL ends "
            "completions at one token only; choose a delimiter of one token, or use forethought train"
        )


class InformationGain:
    """The reward function (eq. 5), times G/(G-1): TRL subtracts the group's mean and this makes it eq. 7.

    It scores the token ids of completions, never their text; a thought that was cut off is closed by force for the
    score, and the forced token is not among those that TRL trains on. Make it before the trainer, which patches the
    model. Logs `gain` (eq. 5, mean) and `closed` (share of thoughts) through TRL.
    """

    def __init__(self, policy: Any, tokenizer: Any, config: Config):
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.form = thought_format(tokenizer, config.method)
        self.ends = copy.deepcopy((policy.config, policy.generation_config))
        check(config, self.form)
        if any(one.requires_grad and one.dtype != torch.float32 for one in policy.parameters()):
            raise UserError("weights that are trained must be fp32 (an update at 1e-6 rounds to nothing in bf16)")
        if "forward" in vars(policy):
            raise UserError("a trainer has patched this model; make the reward before the trainer")
        self.teacher = Teacher(policy, config.method.ema)

    def __call__(
        self,
        completion_ids: Sequence[list[int]],
        context: Sequence[list[int]],
        target: Sequence[list[int]],
        log_metric: Any = None,
        **_: Any,
    ) -> list[float]:
        """One reward a completion, in nats; `context` and `target` are columns of `prompts`."""
        method, close = self.config.method, self.form.close[0]
        closed = [ids[-1] == close for ids in completion_ids]
        rows = [
            [*self.form.prompt_tokens(before), *ids, *(() if done else (close,))]
            for before, ids, done in zip(context, completion_ids, closed, strict=True)
        ]
        plain = {(*before, -1, *true): (before, true) for before, true in zip(context, target, strict=True)}
        low = self.config.model.precision == "bf16"  # as TRL's own passes, without casts that outlive a step
        kind = self.policy.device.type
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=low, cache_enabled=False):
            evidence = self._evidence(self.policy, rows, target)
            asked = self._evidence(self.teacher.model, *zip(*plain.values(), strict=True))
        nothink = dict(zip(plain, discounted(asked, method.discount).tolist(), strict=True))
        gains = [
            value - nothink[(*before, -1, *true)]
            for value, before, true in zip(discounted(evidence, method.discount).tolist(), context, target, strict=True)
        ]
        if log_metric is not None:
            log_metric("gain", sum(gains) / len(gains))
            log_metric("closed", sum(closed) / len(closed))
        return [method.group / (method.group - 1) * gain for gain in gains]

    def _evidence(
        self, model: Any, rows: Sequence[list[int]], targets: Sequence[list[int]]
    ) -> Float[Tensor, "row horizon"]:
        """log p(target | row) at temperature 1 of each target token, on the CPU; a bounded number of rows at once."""
        training = model.training
        model.eval()
        try:
            longest = max(map(len, rows)) + len(targets[0])
            size = max(1, chunk_tokens(model, self.config.update.tokens_per_chunk) // longest)
            found = []
            for start in range(0, len(rows), size):
                some, true = rows[start : start + size], targets[start : start + size]
                read = [[*row, *tokens[:-1]] for row, tokens in zip(some, true, strict=True)]
                tokens, mask = pad_rows(read, self.form.pad, left=True)
                logits = forward(model, tokens.to(model.device), mask.to(model.device), keep=len(true[0]))
                found.append(log_probabilities(logits, torch.tensor(true, device=model.device)).cpu())
        finally:
            model.train(training)
        return torch.cat(found)


class TeacherFollows(TrainerCallback):
    """The EMA teacher (fp32) moves after every optimizer step, and is saved beside TRL's checkpoints."""

    def __init__(self, reward: InformationGain):
        self.reward = reward

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what would score other weights than are trained; take up the teacher of a resumed run."""
        if args.fsdp or args.deepspeed:
            raise UserError("the reward needs the whole policy in every process: FSDP and DeepSpeed are not supported")
        if kwargs.get("model") is not self.reward.policy:
            raise UserError("the trainer trains another model than the reward scores; pass the same object to both")
        if state.global_step:
            load_tensors(self.reward.teacher.model, self._file(args, state))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """phi <- tau phi + (1 - tau) theta."""
        if not self.reward.config.method.freeze_teacher:
            self.reward.teacher.update(self.reward.policy)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """TRL's checkpoint holds no teacher."""
        if state.is_world_process_zero:
            save_tensors(self.reward.teacher.model, str(self._file(args, state)))

    def _file(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "teacher.safetensors"


def arguments(config: Config, folder: str | Path, **more: Any) -> GRPOConfig:
    """The `GRPOConfig` of these options: the paper's objective, one optimizer step a batch, no dropout, fp32 weights.

    `more` is passed on, over what is not the method's own; with `gradient_accumulation_steps` the batch stays
    train.batch positions (a process). Raises UserError for an argument that would make it another method.
    """
    method, train = config.method, config.train
    own: dict[str, Any] = {
        "loss_type": "grpo",  # 1/|c| inside each thought, then the mean over thoughts
        "scale_rewards": "none",
        "importance_sampling_level": "token",
        "beta": 0.0,
        "num_iterations": 1,
        "epsilon": method.clip_low,
        "epsilon_high": method.clip_high,
        "num_generations": method.group,
        "max_completion_length": method.thought_length,
        "temperature": method.temperature,
        "top_p": method.top_p,
        "top_k": 0,
        "generation_kwargs": {"min_new_tokens": 1},  # no empty thought
        "mask_truncated_completions": False,
        "remove_unused_columns": False,
        "disable_dropout": True,
    }
    if clash := sorted(own.keys() & more.keys() | ({"use_vllm", "steps_per_generation"} & more.keys())):
        raise UserError(f"{clash[0]} = {more[clash[0]]!r}: is not to be set here; the method's options decide it")
    pieces = more.get("gradient_accumulation_steps", 1)
    completions = train.batch * method.group
    if completions % pieces:
        raise UserError(f"gradient_accumulation_steps = {pieces}: must divide the {completions} thoughts of a step")
    free = {
        "output_dir": str(folder),
        "seed": config.seed,
        "max_steps": train.steps,
        "per_device_train_batch_size": completions // pieces,
        "shuffle_dataset": False,
        "logging_steps": train.log_every,
        "save_steps": train.checkpoint_every,
        "save_total_limit": train.keep_checkpoints,
    }
    return GRPOConfig(**free | optimizer(config.optim) | machine(config) | own | more)


def prompts(config: Config, tokenizer: Any) -> Dataset:
    """The positions of all steps as prompts: those of `forethought train` with the same options, in the same order.

    Columns: `prompt`, the text that TRL tokenizes; `context`, x_<t in tokens; `target`, the true tokens. TRL takes
    text, so a position whose text is not tokenized to the same tokens again is left out and another drawn.

    Raises UserError for a corpus where that happens nearly everywhere.
    """
    form, method, train = thought_format(tokenizer, config.method), config.method, config.train
    stream_of_windows = Windows(config.corpus, tokenizer, config.seed)
    wanted, drawn, step, rows = train.steps * train.batch, 0, 0, []
    while len(rows) < wanted:
        step += 1
        windows = [next(stream_of_windows) for _ in range(train.batch // method.positions)]
        positions = draw_positions(windows, method, make_generator(config.seed, "positions", step))
        drawn += len(positions)
        for before, true in zip(positions.contexts(), positions.targets().tolist(), strict=True):
            text = as_text(form.prompt_tokens(before), tokenizer)
            if text is not None:
                rows.append({"prompt": text, "context": before, "target": true})
        if drawn > PATIENCE * max(len(rows), train.batch):
            raise UserError(
                f"corpus.path = {config.corpus.path!r}: {drawn - len(rows)} of {drawn} prompts are tokenized otherwise "
                "when TRL reads them as text; use forethought train, which takes tokens"
            )
    return Dataset.from_list(rows[:wanted])


def as_text(tokens: list[int], tokenizer: Any) -> str | None:
    """The text that TRL, which adds special tokens, tokenizes to exactly these tokens; None where there is none."""
    text = tokenizer.decode(tokens[1:] if tokens[0] == tokenizer.bos_token_id else tokens)
    return text if tokenizer(text=text)["input_ids"] == tokens else None


def ending_with(token: int, tokenizer: Any, model: Any) -> Any:
    """A copy of the tokenizer, for TRL alone, and the model's generation options: completions end at this token only.

    TRL ends a completion at the tokenizer's end-of-text token too, so the copy's is the closing token.
    """
    model.generation_config.eos_token_id = token
    ending = copy.deepcopy(tokenizer)
    text = ending.convert_ids_to_tokens(token)
    if ending.pad_token is None:
        ending.pad_token = ending.eos_token or text
    ending.eos_token = text
    return ending


def save(reward: InformationGain, folder: str | Path) -> None:
    """The trained model as a Hugging Face folder, with its own tokenizer and ends of text as they were before."""
    policy = reward.policy
    policy.config, policy.generation_config = copy.deepcopy(reward.ends)
    policy.save_pretrained(folder)
    reward.tokenizer.save_pretrained(folder)


def optimizer(optim: Optim) -> dict[str, Any]:
    """The loop's AdamW; Transformers' schedules end one step earlier or later than ours (docs/trl.md)."""
    schedules = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
    return {
        "optim": "adamw_torch",
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": schedules[optim.schedule],
        "warmup_steps": optim.warmup,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "max_grad_norm": optim.gradient_clip,
    }


def machine(config: Config) -> dict[str, Any]:
    """Device and precision as the config says, and nothing sent anywhere."""
    on_cpu = device(config.model).type == "cpu"
    return {
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "bf16": config.model.precision == "bf16",
        "gradient_checkpointing": False,
        "report_to": [],
    }
