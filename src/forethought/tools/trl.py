"""RLP with TRL: an unmodified `GRPOTrainer` whose reward is the information gain (docs/trl.md).

    trainer = GRPOTrainer(**parts(config, "runs/trl"))

The objective is that of `forethought.algo.RLP`: thoughts at the same positions, rewards computed from the sampled token
ids, A_i = G/(G-1) (r_i - mean r), and TRL's clipped surrogate averaged over the tokens of each thought (1/|c|). With
method.prediction_weight the trainer is an `RLPTrainer`, which adds the prediction term.

Also TRL's trainers for post-training (docs/post-training.md): `sft`, and `grpo` with a reward function of the caller.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model as save_tensors
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from forethought.algo.rewards import discounted
from forethought.config import Config, Notice, UserError, flatten, to_dict
from forethought.config.registry import entry
from forethought.data.corpus import Windows
from forethought.data.positions import ThoughtFormat, draw_positions, make_generator, pad_rows, thought_format
from forethought.models.compute_copy import Teacher
from forethought.models.loading import check_context_length, device, load_model, load_tokenizer, save_thinking_options
from forethought.models.logprobs import chunk_tokens, forward, log_probabilities
from forethought.tools.posttrain.stage import Example, Stage, end_token

try:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
except ModuleNotFoundError as error:
    raise UserError("TRL is not installed; install it with: pip install 'forethought[trl]'") from error

MAX_DRAWN_PER_PROMPT = 20
"""Positions drawn for each usable prompt before `prompts` gives up on a corpus."""

FIXED = (
    "method.name", "method.baseline", "method.scale", "method.clamp_gain", "method.min_gain", "method.kl_weight",
    "method.length_norm", "method.inner_steps", "method.unclosed", "method.teacher_every", "method.distillation",
    "rollout.engine", "rollout.precision", "rollout.importance_cap", "lora.r", "train.tokens", "train.flops",
    "train.tracker", "parallel.shard",
)  # fmt: skip
"""Options that must keep their defaults: this adapter implements no other value."""

UNUSED = (
    "model.prefix", "model.decoding", "rollout.cache_gb", "rollout.timeout_s", "lora.alpha", "lora.target_modules",
    "train.rollout_batch", "train.log_thoughts", "update.offload", "update.compile", "update.attention",
    "parallel.timeout_s",
    "method.min_entropy", "method.proxy", "method.prediction_length", "method.end", "method.unclosed_penalty",
)  # fmt: skip
"""Options that change nothing here: TRL samples and logs in its own way, or what they belong to is excluded."""
Progress = Callable[[int, int], None]
"""Called after each step with the number of finished steps and of all steps."""


def parts(config: Config, folder: str | Path, **more: Any) -> dict[str, Any]:
    """The keyword arguments of a `GRPOTrainer` that trains RLP with the options of a run.

    Loads model and tokenizer, draws the prompts of all steps, and creates the reward, the `GRPOConfig` and the callback
    that updates the teacher. `more` is passed to `arguments`. Raises UserError for options that TRL does not support.
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
        "processing_class": stopping_at(closing_tokens(form), tokenizer, model),
        "callbacks": [TeacherUpdate(reward)],
    }


def check(config: Config, form: ThoughtFormat) -> None:
    """Raise UserError for options that TRL's GRPO does not implement."""
    method, found, default = config.method, flatten(to_dict(config)), flatten(to_dict(Config()))
    for option in FIXED:
        if found[option] != default[option]:
            says = f"{option} = {found[option]!r}: must be {default[option]!r} with TRL"
            raise UserError(f"{says}; use forethought train")
    if method.reward_name != "information_gain":
        raise UserError(f"method.reward = {method.reward!r}: must be 'information_gain' with TRL")
    if entry("position_policy", method.policy).proxy:
        raise UserError(f"method.position_policy = {method.policy!r}: TRL's prompts are drawn without a proxy")
    if len(form.close) > 1:
        raise UserError(
            f"method.close = {method.close!r}: is {len(form.close)} tokens of this tokenizer, but TRL stops a "
            "completion at a single token; choose a delimiter of one token, or use forethought train"
        )


class InformationGain:
    """The reward function: information gain (eq. 5) times G/(G-1), which TRL's group mean turns into eq. 7.

    Scores the token ids of completions, never their text. A truncated thought is scored with the closing delimiter
    appended; TRL does not train on that token. Create the reward before the trainer, which patches the model. Logs
    `gain` (mean of eq. 5, in nats) and `closed` (share of thoughts) through TRL.
    """

    def __init__(self, policy: Any, tokenizer: Any, config: Config):
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.form = thought_format(tokenizer, config.method)
        self.original_configs = copy.deepcopy((policy.config, policy.generation_config))
        check(config, self.form)
        if any(one.requires_grad and one.dtype != torch.float32 for one in policy.parameters()):
            raise UserError("trainable weights must be fp32: in bf16, updates with a learning rate of 1e-6 round to 0")
        if "forward" in vars(policy):
            raise UserError("a trainer has already patched this model; create the reward before the trainer")
        self.teacher = Teacher(policy, config.method.ema)
        self.adds_prediction_term = False  # an RLPTrainer sets it

    def __call__(
        self,
        completion_ids: Sequence[list[int]],
        context: Sequence[list[int]],
        target: Sequence[list[int]],
        log_metric: Any = None,
        **_: Any,
    ) -> list[float]:
        """One reward per completion, in nats. `context` and `target` are columns of `prompts`."""
        method, ends = self.config.method, closing_tokens(self.form)
        closed = [ids[-1] in ends for ids in completion_ids]
        prompts, bridges = [self.form.prompt_tokens(one) for one in context], [self.form.bridge(one) for one in context]
        prefixes = _think_prefixes(self.form, prompts, completion_ids, bridges)
        keys = [(tuple(before), tuple(true)) for before, true in zip(context, target, strict=True)]
        unique = list(dict.fromkeys(keys))  # the teacher scores a position once
        kind, bf16 = self.policy.device.type, self.config.model.precision == "bf16"
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=bf16, cache_enabled=False):  # as TRL does
            think_logp = self._target_logp(self.policy, prefixes, target)
            no_think_logp = self._target_logp(self.teacher.model, *zip(*unique, strict=True))
        baseline = dict(zip(unique, discounted(no_think_logp, method.discount).tolist(), strict=True))
        evidence = discounted(think_logp, method.discount).tolist()
        gains = [value - baseline[key] for value, key in zip(evidence, keys, strict=True)]
        if log_metric is not None:
            log_metric("gain", sum(gains) / len(gains))
            log_metric("closed", sum(closed) / len(closed))
        return [method.group / (method.group - 1) * gain for gain in gains]

    def _target_logp(
        self, model: Any, prefixes: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> Float[Tensor, "row horizon"]:
        """log p(target | prefix) of each target token at temperature 1, on the CPU, computed in chunks of rows."""
        training = model.training
        model.eval()
        try:
            longest = max(map(len, prefixes)) + len(targets[0])
            size = max(1, chunk_tokens(model, self.config.update.tokens_per_chunk) // longest)
            true = torch.tensor(targets, device=model.device).split(size)
            parts = zip(range(0, len(prefixes), size), true, strict=True)
            chunks = [_logp_of_targets(model, self.form.pad, prefixes[i : i + size], some).cpu() for i, some in parts]
        finally:
            model.train(training)
        return torch.cat(chunks)


def _think_prefixes(
    form: ThoughtFormat, prompts: Sequence[list[int]], completions: Sequence[list[int]], bridges: Sequence[list[int]]
) -> list[list[int]]:
    """What is read before the targets: each prompt, its thought, and the bridge to the text."""
    ends = closing_tokens(form)
    return [
        [*prompt, *form.content(ids, ids[-1] in ends), *bridge]
        for prompt, ids, bridge in zip(prompts, completions, bridges, strict=True)
    ]


def _logp_of_targets(
    model: Any, pad: int, prefixes: Sequence[Sequence[int]], targets: Int[Tensor, "row horizon"]
) -> Float[Tensor, "row horizon"]:
    """log p(target | prefix) of each target token at temperature 1, by one forward pass, in nats."""
    rows = [[*one, *true[:-1]] for one, true in zip(prefixes, targets.tolist(), strict=True)]
    tokens, mask = (some.to(targets.device) for some in pad_rows(rows, pad, left=True))
    return log_probabilities(forward(model, tokens, mask, keep=targets.shape[1]), targets)


class RLPTrainer(GRPOTrainer):
    """A `GRPOTrainer` whose loss has the prediction term (method.prediction_weight; docs/beyond-the-paper.md).

    Its only reward function is an `InformationGain`. The term takes a forward pass of its own. Logs `prediction_loss`.
    """

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        reward, *others = self.reward_funcs
        if others or not isinstance(reward, InformationGain):
            raise UserError("reward_funcs: must be a single InformationGain for the prediction term")
        self.reward = reward
        self.reward.adds_prediction_term = True

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        bridges = [self.reward.form.bridge(row["context"]) for row in inputs]
        for name, column in (("target", [row["target"] for row in inputs]), ("bridge", bridges)):
            output[name] = torch.tensor(column, device=output["completion_ids"].device)
        if self.state.global_step < self.reward.config.method.warmup_steps:
            output["advantages"] = torch.zeros_like(output["advantages"])
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        method, form = self.reward.config.method, self.reward.form
        prompts, thoughts = (
            [ids[real.bool()].tolist() for ids, real in zip(inputs[f"{part}_ids"], inputs[f"{part}_mask"], strict=True)]
            for part in ("prompt", "completion")
        )
        prefixes = _think_prefixes(form, prompts, thoughts, inputs["bridge"].tolist())
        logp = _logp_of_targets(model, form.pad, prefixes, inputs["target"])
        loss = -discounted(logp, method.discount).mean()
        self._log_metric("prediction_loss", float(loss.detach()))
        scale = method.prediction_weight / self.current_gradient_accumulation_steps
        return super()._compute_loss(model, inputs) + scale * loss


class TeacherUpdate(TrainerCallback):
    """Updates the fp32 EMA teacher after every optimizer step, and saves it in TRL's checkpoints."""

    def __init__(self, reward: InformationGain):
        self.reward = reward

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise UserError if the reward would score other weights than the trainer's; restore a resumed teacher."""
        if args.fsdp or args.deepspeed:
            raise UserError("FSDP and DeepSpeed are not supported: the reward needs all weights in every process")
        if kwargs.get("model") is not self.reward.policy:
            raise UserError("the trainer and the reward have different models; pass the same object to both")
        if self.reward.config.method.prediction_weight and not self.reward.adds_prediction_term:
            raise UserError(
                "method.prediction_weight: needs an RLPTrainer (forethought.tools.trl) for the prediction term"
            )
        if state.global_step:
            load_tensors(self.reward.teacher.model, self._file(args, state))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """phi <- tau phi + (1 - tau) theta."""
        if not self.reward.config.method.freeze_teacher:
            self.reward.teacher.update(self.reward.policy)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the teacher's weights to TRL's checkpoint."""
        if state.is_world_process_zero:
            save_tensors(self.reward.teacher.model, str(self._file(args, state)))

    def _file(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "teacher.safetensors"


def arguments(config: Config, folder: str | Path, **more: Any) -> GRPOConfig:
    """The `GRPOConfig` of these options: the paper's objective, one optimizer step per batch, no dropout, fp32 weights.

    `more` overrides arguments that do not define the method. With `gradient_accumulation_steps`, a batch is still
    train.batch positions per process. Raises UserError for an argument that would change the method; warns of options
    that TRL does not use.
    """
    found, default = flatten(to_dict(config)), flatten(to_dict(Config()))
    if unused := [f"{option} = {found[option]!r}" for option in UNUSED if found[option] != default[option]]:
        warnings.warn(f"options that change nothing with TRL: {', '.join(unused)}", Notice, stacklevel=2)
    method, train = config.method, config.train
    fixed: dict[str, Any] = {
        "loss_type": "grpo",  # mean over the tokens of each thought, then over thoughts
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
        "generation_kwargs": {"min_new_tokens": method.shortest_thought},
        "mask_truncated_completions": False,
        "remove_unused_columns": False,
        "disable_dropout": True,
    }
    if clash := sorted((fixed.keys() | {"use_vllm", "steps_per_generation"}) & more.keys()):
        raise UserError(f"{clash[0]} = {more[clash[0]]!r}: cannot be set here; it follows from the method's options")
    count, thoughts = more.get("gradient_accumulation_steps", 1), train.batch * method.group
    if thoughts % count:
        raise UserError(f"gradient_accumulation_steps = {count}: must divide the {thoughts} thoughts of a step")
    defaults = {
        "per_device_train_batch_size": thoughts // count,
        "shuffle_dataset": False,
        "save_steps": train.checkpoint_every,
        "save_total_limit": train.keep_checkpoints,
    }
    return GRPOConfig(**common_arguments(config, folder) | defaults | fixed | more)


def prompts(config: Config, tokenizer: Any) -> Dataset:
    """The positions of all steps as prompts: those of `forethought train` with the same options, in the same order.

    Columns: `prompt`, the text that TRL tokenizes; `context`, the tokens of x_<t; `target`, the true tokens. TRL takes
    text, so positions whose text does not tokenize back to the same tokens are skipped and replaced.

    Raises UserError for a corpus where this affects nearly all positions.
    """
    form, method, train = thought_format(tokenizer, config.method), config.method, config.train
    windows = Windows(config.corpus, tokenizer, config.seed)
    count, drawn, step, rows = train.steps * train.batch, 0, 0, []
    while len(rows) < count:
        step += 1
        batch = [next(windows) for _ in range(train.batch // method.positions)]
        positions = draw_positions(batch, method, make_generator(config.seed, "positions", step))
        drawn += len(positions)
        for before, true in zip(positions.contexts(), positions.targets().tolist(), strict=True):
            tokens = form.prompt_tokens(before)
            text = tokenizer.decode(tokens[1:] if tokens[0] == tokenizer.bos_token_id else tokens)
            if tokenizer(text=text)["input_ids"] == tokens:
                rows.append({"prompt": text, "context": before, "target": true})
        if drawn > MAX_DRAWN_PER_PROMPT * max(len(rows), train.batch):
            raise UserError(
                f"corpus.path = {config.corpus.path!r}: the text of {drawn - len(rows)} of {drawn} prompts does not "
                "tokenize back to the same tokens, which TRL needs; use forethought train, which takes tokens"
            )
    return Dataset.from_list(rows[:count])


def stopping_at(ends: list[int], tokenizer: Any, model: Any) -> Any:
    """A copy of the tokenizer for TRL whose end-of-text token is the first of `ends`; completions stop at all of them.

    TRL stops at the tokenizer's end-of-text token and at those of the model's generation config, which is changed in
    place.
    """
    model.generation_config.eos_token_id = list(ends)
    copied = copy.deepcopy(tokenizer)
    text = copied.convert_ids_to_tokens(ends[0])
    if copied.pad_token is None:
        copied.pad_token = copied.eos_token or text
    copied.eos_token = text
    return copied


def closing_tokens(form: ThoughtFormat) -> list[int]:
    """The tokens that close a thought, the delimiter itself first."""
    return [form.close[0], *(token for token in form.closing.first.tolist() if token != form.close[0])]


def save(reward: InformationGain, folder: str | Path) -> None:
    """Save the trained model as a Hugging Face folder, with its original tokenizer, end-of-text tokens and options."""
    reward.policy.config, reward.policy.generation_config = copy.deepcopy(reward.original_configs)
    reward.policy.save_pretrained(folder)
    reward.tokenizer.save_pretrained(folder)
    save_thinking_options(Path(folder), reward.config)


def common_arguments(config: Config, folder: str | Path) -> dict[str, Any]:
    """Arguments of any TRL trainer: steps, seed, device, precision, no trackers, and the AdamW of `forethought train`.

    The learning rate schedule may be off by one step (docs/trl.md).
    """
    optim, on_cpu = config.optim, device(config.model).type == "cpu"
    schedules = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
    return {
        "output_dir": str(folder),
        "seed": config.seed,
        "max_steps": config.train.steps,
        "logging_steps": config.train.log_every,
        "optim": "adamw_torch",
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": schedules[optim.schedule],
        "warmup_steps": optim.warmup,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "max_grad_norm": optim.gradient_clip,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "bf16": config.model.precision == "bf16",
        "gradient_checkpointing": config.update.checkpointing,
        "report_to": [],
    }


def sft(start: tuple[Any, Any], rows: Sequence[Example], config: Config, progress: Progress) -> list[dict[str, Any]]:
    """Train with `SFTTrainer` on train.batch examples per step, in order; the loss covers completions only.

    `start`: model and tokenizer. Updates the weights in place, returns TRL's log.
    """
    model, tokenizer = start
    labeled = [
        {"input_ids": one.prompt + one.completion, "labels": [-100] * len(one.prompt) + one.completion} for one in rows
    ]
    with _arguments_of_stage(model, config) as common:
        arguments = SFTConfig(
            **common,
            per_device_train_batch_size=config.train.batch,
            train_sampling_strategy="sequential",
            max_length=None,
        )
        data, tokenizer = Dataset.from_list(labeled), copy.deepcopy(tokenizer)
        return _train(SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer), progress)


@torch.no_grad()
def completion_loss(model: Any, rows: Sequence[Example]) -> float:
    """Mean -log p of the completions' tokens given their prompts, in nats per token: the loss of `sft`."""
    model.eval()
    targets = [torch.tensor([one.completion], device=model.device) for one in rows]
    pairs = zip(rows, targets, strict=True)
    total = sum(_logp_of_targets(model, 0, [one.prompt], true).sum().item() for one, true in pairs)
    return -total / sum(true.numel() for true in targets)


def grpo(
    start: tuple[Any, Any], rows: Sequence[Example], reward: Any, stage: Stage, config: Config, progress: Progress
) -> list[dict[str, Any]]:
    """Train with `GRPOTrainer` and its defaults on train.batch prompts per step, in order; `reward` gets the answers.

    `start`: model and tokenizer. Updates the weights in place, returns TRL's log.
    """
    model, tokenizer = start
    with _arguments_of_stage(model, config) as common:
        end = end_token(stage, tokenizer)
        stopping = copy.deepcopy(tokenizer) if end is None else stopping_at([end], tokenizer, model)
        texts = [tokenizer.decode(one.prompt) for one in rows]
        _fix_tokens(stopping, {text: one.prompt for text, one in zip(texts, rows, strict=True)})
        columns = {"prompt": texts, "answer": [one.answer for one in rows], "repeated": [one.repeated for one in rows]}
        arguments = GRPOConfig(
            **common,
            per_device_train_batch_size=config.train.batch * stage.group,
            num_generations=stage.group,
            max_completion_length=stage.max_tokens,
            temperature=stage.temperature,
            disable_dropout=True,
            shuffle_dataset=False,
        )
        data = Dataset.from_dict(columns)
        return _train(GRPOTrainer(model, reward, arguments, train_dataset=data, processing_class=stopping), progress)


def _fix_tokens(tokenizer: Any, prompts: dict[str, list[int]]) -> None:
    """Make the tokenizer return exactly these tokens for these texts: TRL takes prompts as text only."""
    kind = type(tokenizer)

    def call(self: Any, text: Any = None, **options: Any) -> Any:
        if isinstance(text, list) and all(one in prompts for one in text):
            return {"input_ids": [prompts[one] for one in text]}
        return kind.__call__(self, text, **options)

    tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": call})


@contextlib.contextmanager
def _arguments_of_stage(model: Any, config: Config) -> Iterator[dict[str, Any]]:
    """Arguments of both trainers, with a temporary folder.

    Restores the model's config and generation config: trainers set their end-of-text and padding tokens.
    """
    configs = copy.deepcopy((model.config, model.generation_config))
    with TemporaryDirectory() as folder:
        try:
            yield common_arguments(config, folder) | {"save_strategy": "no", "disable_tqdm": True}
        finally:
            model.config, model.generation_config = configs


class _ReportProgress(TrainerCallback):
    def __init__(self, progress: Progress):
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)


def _train(trainer: Any, progress: Progress) -> list[dict[str, Any]]:
    trainer.add_callback(_ReportProgress(progress))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [line for line in trainer.state.log_history if "train_runtime" not in line]
