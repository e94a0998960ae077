"""Every option of Forethought, nested by stage. The docstring under a field is its `--help`."""

import dataclasses
import math
import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from forethought.config import registry
from forethought.config.registry import Entry, Kind

Positive = Annotated[int, Field(ge=1, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
_Task = Annotated[str, Field(pattern="^(gsm8k|math500|aime24|aime25|amc23|minerva|mmlu|mmlu_pro|gpqa)(=.+)?$")]
_USUAL = ("gsm8k", "math500", "aime24", "aime25", "amc23", "minerva", "mmlu", "mmlu_pro")
_SPLIT = BeforeValidator(lambda names: names.split(",") if isinstance(names, str) else names)
_STRICT = ConfigDict(extra="forbid", strict=True)


def _expanded(path: str) -> str:
    expanded = os.path.expanduser(path)  # noqa: PTH111
    if expanded.startswith("~"):
        raise PydanticCustomError("home", "no such home folder; give the whole path, or ./~ for a folder of that name")
    return expanded


def _registered(kind: Kind, *more: str) -> AfterValidator:
    def check(name: str) -> str:
        if name in more or registry.known(kind, name):
            return name
        names = ", ".join([*more, *registry.TABLES[kind]])
        raise PydanticCustomError("registry", "must be {names} or module:attribute", {"names": names})

    return AfterValidator(check)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Model:
    """The model and its precision."""

    path: Name = "embedded"
    """A base inside the package (`embedded`, `embedded:notes`), a hub id, a folder, or a .gguf file (dequantized)."""
    tokenizer: str = ""
    """Tokenizer hub id or folder; empty: the one that comes with the model."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random`: take only the architecture from model.path (a folder or a config.json) and initialize new weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision. Weights, gradients, optimizer and teacher are fp32 either way; bf16 computes with a copy."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one."""
    prefix: Literal["shared", "replicated"] = "shared"
    """Read a document once for all its thoughts, or (for families that cannot share) a copy for each; same result."""
    decoding: Literal["auto", "eager", "cuda_graphs", "cuda_graphs_compiled", "cpp"] = "auto"
    """Decoding of thoughts: eager, CUDA graphs (also of a compiled model), or on a CPU C++ (for Llama-style decoders).
    `auto`: CUDA graphs or, from a million weights on, C++ where they are supported, else eager (on a CPU prepacked)."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Corpus:
    """The text and how it is cut into windows."""

    path: Name = "world:cups/train"
    """File, folder or glob (.txt .md .jsonl .ndjson .json .parquet, each also .gz or .zst), `hub:ID`, or an embedded
    world `world:NAME/SPLIT`."""
    field: Name = "text"
    """Name of the text field in the rows of JSON, .parquet and hub data."""
    domain_field: str = ""
    """Field that names a row's domain, each a group of the evaluation; empty: of several files each is a domain."""
    language_field: str = ""
    """Field that names a row's language, each a group of the evaluation; empty: none."""
    split: Name = "train"
    """Split of a hub data set."""
    window: Annotated[int, Field(ge=2)] = 2048
    """Maximum length of a window, in tokens; longer documents are cut into several."""
    min_tokens: Annotated[int, Field(ge=2)] = 8
    """Windows shorter than this many tokens are skipped and counted."""
    shuffle: Count = 1024
    """Size of the shuffle buffer, in documents (files are shuffled too); 0 keeps the order of the corpus."""
    skip_bad_rows: bool = False
    """Skip and count rows that are null, nested, malformed or no text, instead of stopping at the first one."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Method:
    """The objective. Defaults are the paper's where it gives a value (arXiv:2510.01265); see docs/paper.md."""

    name: Annotated[Name, _registered("method")] = "rlp"
    """The training method, or `module:attribute` for a class of your own."""
    group: Positive = 16
    """Thoughts per position (G); at least 2 unless the baseline is not the group's."""
    thought_length: Positive = 2048
    """Maximum length of a thought (L), in sampled tokens, a sampled closing delimiter included."""
    positions: Positive = 1
    """Positions drawn from each window (K)."""
    position_policy: Annotated[Name, _registered("position_policy", "auto")] = "auto"
    """How positions are drawn from a window, or `module:attribute`. `auto`: uniform; for rpt, entropy."""
    marked_share: Share = 0.5
    """Probability that a position is drawn among the tokens that the corpus marks (position_policy `marked`)."""
    min_entropy: NonNegative = 1.0
    """Minimum next-token entropy of the proxy at a position, in nats (position_policy `entropy`)."""
    proxy: str = ""
    """Proxy with the same tokenizer, named as model.path is (position_policy `entropy`); empty: the frozen start;
    `policy`: the policy's current weights, so no other model is kept."""
    prediction_length: Positive = 1
    """Tokens sampled after a thought as a prediction of the text (rpt), a sampled method.end included."""
    end: str = ""
    """Text that must end a prediction (rpt); empty: all of its tokens are the prediction."""
    horizon: Positive = 1
    """Target tokens scored after a thought (H); 1 in the paper."""
    discount: Share = 1.0
    """Weight gamma^k of the k-th scored token."""
    temperature: Above0 = 0.7
    """Sampling temperature of thoughts and of the ratios; targets are always scored at temperature 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling of thoughts. Below 1 the ratios are still those of the untruncated distribution."""
    reward: Annotated[Name, _registered("reward", "auto")] = "auto"
    """Reward of a thought, or `module:attribute` for a function of your own. `auto`: the method's own reward."""
    baseline: Literal["group", "batch", "none"] = "group"
    """Baseline of a reward: the mean of its group (eq. 7), the mean of all positions of the step, or none."""
    scale: Literal["none", "std"] = "none"
    """`std` divides advantages by the group's standard deviation (baseline `group`), as GRPO does, not the paper."""
    clamp_gain: bool = False
    """Clamp negative gains to zero. Not shift-invariant: the teacher then affects the update."""
    min_gain: float = -math.inf
    """Train only on positions where some thought gains at least this much, in nats. Not shift-invariant."""
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegative = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    inner_steps: Positive = 1
    """Optimizer steps on one batch of thoughts. From the second on, ratios differ from 1."""
    ema: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Decay tau of the EMA teacher."""
    teacher_every: Count = 1
    """Score the teacher (so log the gain) on the first and every n-th step; 0: never. The update stays the same."""
    freeze_teacher: bool = False
    """Keep the start as teacher instead of the EMA (a control: without method.distillation the update is the same)."""
    prediction_weight: NonNegative = 0.0
    """Weight of the prediction term: the gradient of log p of the targets after each thought (their discounted sum).
    0: the paper; 1: with length_norm none and temperature 1, the whole gradient of the expected reward."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the teacher's distribution without a thought in the targets of the prediction term; the rest is the
    text. Takes a softmax over the vocabulary for each token of the horizon."""
    warmup_steps: Count = 0
    """Train only the prediction term (and any KL) in the first steps, not the choice of thoughts; see optim.warmup for
    the learning rate's."""
    length_norm: Literal["thought", "none"] = "thought"
    """Mean over the sampled tokens of a thought (1/|c|, the paper), or their sum."""
    allow_empty: bool = False
    """Allow thoughts that close at once; otherwise their first token never closes them."""
    min_thought_length: Positive = 1
    """Minimum length of a thought, in tokens before the closing delimiter; 1 in the paper. Above 1 none of them may be
    a token that can complete the delimiter, such as > for </think>."""
    repeat_context: Count = 0
    """Tokens at the end of the context that are repeated after a thought, before the text goes on; 0 in the paper."""
    kl_weight: NonNegative = 0.0
    """Weight (beta) of a token-level KL to the frozen start on thought tokens; above 0 keeps one more copy."""
    unclosed: Literal["score", "drop", "penalize"] = "score"
    """A thought cut off at thought_length is closed by force, then scored as it is, dropped, or penalized."""
    unclosed_penalty: NonNegative = 1.0
    """Nats subtracted from the reward of an unclosed thought (unclosed `penalize`)."""
    open: Name = "<think>"
    """Text before a thought."""
    close: Name = "</think>"
    """Text after a thought, which ends as soon as its text contains this."""
    prompt: str = "{context}"
    """Template around the context of a thought, with {context} once. Scoring without a thought does not use it."""

    @property
    def entry(self) -> Entry:
        """The method's entry in the registry."""
        return registry.entry("method", self.name)

    @property
    def samples_thoughts(self) -> bool:
        """Whether training samples thoughts."""
        return self.entry.samples_thoughts

    @property
    def policy(self) -> str:
        """The position policy, `auto` resolved."""
        return self.position_policy if self.position_policy != "auto" else self._default("method.position_policy")

    @property
    def reward_name(self) -> str:
        """The reward, `auto` resolved."""
        return self.reward if self.reward != "auto" else self._default("method.reward")

    @property
    def shortest_thought(self) -> int:
        """How many tokens a thought has before it may close."""
        return 0 if self.allow_empty else self.min_thought_length

    def _default(self, option: str) -> str:
        first = {"method.reward": self.entry.rewards[0]} if self.entry.rewards else {}
        return {**registry.AUTOMATIC, **first, **self.entry.defaults}[option]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Rollout:
    """Sampling of thoughts, in training and on held-out text."""

    engine: Annotated[Name, _registered("engine")] = "native"
    """The engine that samples thoughts, or `module:attribute` for one of your own."""
    precision: Literal["policy", "bf16"] = "policy"
    """Weights that thoughts are sampled with. bf16 (in C++ on a CPU, or vLLM): half as much to read from memory, and
    products in bf16 where the processor has them; the evidence is then computed by the policy, in another pass."""
    cache_gb: Above0 = 1.0
    """Size of vLLM's key-value cache, in GiB, in addition to its copy of the weights."""
    timeout_s: Above0 = 600.0
    """Seconds after which a call of vLLM counts as hung, and the run stops with an error."""
    importance_cap: NonNegative = 0.0
    """Weight thought tokens by min(policy / sampler, cap), for a sampler that differs from the policy; 0: off."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Optim:
    """AdamW on fp32 weights."""

    learning_rate: Above0 = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or decay to zero just after train.steps."""
    warmup: Count = 0
    """Steps of linear warm-up."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's first-moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's second-moment decay."""
    gradient_clip: NonNegative = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Lora:
    """Low-rank adapters (arXiv:2106.09685, extra `lora`): W + alpha / r * B A, with W frozen."""

    r: Count = 0
    """Rank of the adapters; 0: no adapters, all weights are trained."""
    alpha: Positive = 32
    """Scale of the adapters: B A is multiplied by alpha / r."""
    target_modules: Annotated[tuple[Name, ...], _SPLIT, Field(min_length=1, strict=False)] = ("all-linear",)
    """Linear layers with adapters, by suffixes of their names, separated by commas; `all-linear`: all but the head."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Train:
    """The training loop."""

    steps: Positive = 100
    """Maximum number of steps."""
    tokens: Count = 0
    """Stop after the step that has read this many tokens of the corpus; 0: never. The schedule follows."""
    flops: NonNegative = 0.0
    """Stop after the step that has spent this many FLOPs (docs/flops.md); 0: never. The schedule follows."""
    batch: Positive = 512
    """Positions per step (rlp, rpt) or windows per step (cpt)."""
    rollout_batch: Count = 0
    """Thoughts decoded at once; 0: as many as fit, chosen at the start. Changes speed and memory, not the result."""
    log_every: Positive = 1
    """Steps between lines of metrics.jsonl."""
    log_thoughts: Count = 2
    """Positions whose thoughts are all written to thoughts.jsonl at each logged step."""
    checkpoint_every: Positive = 50
    """Steps between checkpoints; one more is written at the end and when the run is stopped."""
    keep_checkpoints: Positive = 2
    """Number of newest checkpoints to keep."""
    tracker: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """Also send metrics to a tracker, and every checkpoint_every steps the logged thoughts, as a table or text."""

    @property
    def rows(self) -> int:
        """Thoughts decoded at once; 128 where none were chosen."""
        return self.rollout_batch or 128

    def logs(self, step: int) -> bool:
        """Whether a step is logged: every log_every-th, the first and the last."""
        return step % self.log_every == 0 or step in (1, self.steps)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Update:
    """The backward pass."""

    tokens_per_chunk: Count = 0
    """Tokens in one forward and backward pass; 0: as many as fit. Changes speed and memory, not results."""
    checkpointing: bool = False
    """Activation checkpointing: keep only the inputs of each layer and recompute the rest. Less memory, more time."""
    compile: bool = False
    """Compile the layers that read thoughts, once for all sizes (about a minute, at first). Not measured on a GPU yet.
    For models whose layers are attention and dense MLPs. Results stay the same up to rounding."""
    attention: Literal["flash", "triton"] = "flash"
    """Attention of thoughts to shared documents: torch's flash kernels, several for each position, or Triton kernels
    for all at once. `triton` needs a GPU and has not run on one yet. Results stay the same up to rounding."""
    offload: bool = False
    """On a GPU: keep Adam's moments, the teacher and what else is idle in host memory while thoughts are sampled, for
    more of them at once. CUDA graphs are then captured in every step: for long thoughts. Results stay the same."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Parallel:
    """Several processes, started by torchrun or `accelerate launch`."""

    shard: Literal["none", "zero1"] = "none"
    """`zero1`: shard fp32 weights, optimizer state and teacher; each process keeps a full compute copy. `none`: DDP."""
    timeout_s: Positive = 1800
    """Timeout of collectives, in seconds; must exceed the longest step or evaluation."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Evaluate:
    """Held-out text, before and after training and in `forethought evaluate`."""

    path: str = ""
    """Held-out corpus, as corpus.path; empty: training does not evaluate."""
    documents: Positive = 200
    """Windows to evaluate on: one per document, more only if there are too few documents."""
    positions: Positive = 4
    """Positions per window for the group `all`."""
    thoughts: Positive = 1
    """Thoughts sampled per position; metrics are means over them."""
    view: Count = 3
    """Windows in which `forethought evaluate` samples thoughts at every position, for the viewer; 0: none."""
    view_thoughts: Positive = 4
    """Thoughts per position in these windows."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Questions:
    """Questions with checkable answers, in `forethought questions`. A thought may take method.thought_length tokens."""

    tasks: Annotated[tuple[_Task, ...], _SPLIT, Field(min_length=1, strict=False)] = _USUAL
    """Names, separated by commas: gsm8k math500 aime24 aime25 amc23 minerva mmlu mmlu_pro gpqa, or NAME=FILE."""
    data: str = ""
    """Folder of task files (NAME.jsonl, .jsonl.gz or .csv); empty: each task's data set on the hub."""
    shots: Count = 4
    """Worked examples before each question, at most (gsm8k has 8, mmlu 5 a subject, the others 4)."""
    samples: Count = 4
    """Answers sampled to each question, for pass@1, besides the greedy one."""
    thinking: Literal["with", "without", "both"] = "both"
    """Whether the model thinks between its delimiters before it answers; the prompt is the same."""
    max_tokens: Positive = 512
    """Longest answer, in tokens, after the thought."""
    temperature: Above0 = 0.7
    """Sampling temperature of sampled answers and of the thoughts before them."""
    limit: Count = 0
    """Questions of each task, evenly spaced over its file; 0: all of them."""
    batch: Positive = 64
    """Answers decoded at once; changes speed and memory, not the result."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """All options of a run, saved as config.json in the run folder."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all random draws: order of documents, positions, thoughts, new weights."""
    run: Annotated[Name, AfterValidator(_expanded)] = "runs/forethought"
    """Run folder to create."""
    overwrite: bool = False
    """Replace the run folder if it exists; only a folder that holds a Forethought run is ever replaced."""
    model: Model = dataclasses.field(default_factory=Model)
    corpus: Corpus = dataclasses.field(default_factory=Corpus)
    method: Method = dataclasses.field(default_factory=Method)
    rollout: Rollout = dataclasses.field(default_factory=Rollout)
    optim: Optim = dataclasses.field(default_factory=Optim)
    lora: Lora = dataclasses.field(default_factory=Lora)
    train: Train = dataclasses.field(default_factory=Train)
    update: Update = dataclasses.field(default_factory=Update)
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    questions: Questions = dataclasses.field(default_factory=Questions)

    @property
    def rescores(self) -> bool:
        """Whether the policy reads the thoughts again for their evidence, since something else sampled them."""
        return self.samples_with_vllm or self.samples_in_bf16

    @property
    def samples_with_vllm(self) -> bool:
        """Whether vLLM samples. Mixed samples with an engine of its own."""
        return self.rollout.engine == "vllm" and self.method.name != "mixed"

    @property
    def samples_in_bf16(self) -> bool:
        """Whether the native engine samples in C++ with bf16 weights."""
        return self.rollout.precision == "bf16" or (self.model.precision, self.model.decoding) == ("bf16", "cpp")

    @property
    def shift_invariant(self) -> bool:
        """Whether adding a constant to one position's rewards leaves the policy term as it is: the teacher cancels."""
        method = self.method
        return method.baseline == "group" and not method.clamp_gain and method.min_gain == -math.inf
