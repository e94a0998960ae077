"""What is planned: a config, a network's shape, machines, and the lengths of prefixes and thoughts."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

from forethought.config import Config, UserError
from forethought.flops import Shape, Work
from forethought.tools.plan.machines import Machine, machine

Layout = Literal["one", "ddp", "fsdp2"]
"""How the network lies on the GPUs.

- one: one process
- ddp: a whole copy on each GPU, gradients added up once a step
- fsdp2: masters, optimizer and teacher in equal parts on the GPUs; weights in compute precision gathered once a step,
  gradients whole on each GPU until the step's one synchronisation
"""
_SHAPES = Path(__file__).parent / "shapes"
_CHARACTERS = 4  # of a template, to a token
_UNUSED = ("moe_latent_size", "moe_intermediate_size", "moe_shared_expert_intermediate_size")
_COUNTS = ("num_experts_per_tok", "num_local_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run to plan. Lengths are in tokens; `prefix`, `document` and `length` are typical ones, limits the config's."""

    config: Config
    shape: Shape
    machine: Machine
    gpus: int = 1
    per_node: int = 8
    layout: Layout = "one"
    prefix: int  # what the last position of a document has ahead of it, without the template
    document: int  # what the teacher reads of it
    longest: int  # prefix of the longest document
    length: float  # of a thought, the sampled closing delimiter included; the mean
    opening: int = 1
    closing: int = 1
    gradient: int = 4  # bytes of a parameter's gradient

    @property
    def template(self) -> int:
        """Tokens of the template ahead of a context: a token for four characters, since no tokenizer is asked."""
        return math.ceil(len(self.config.method.prompt.partition("{context}")[0]) / _CHARACTERS)

    @property
    def behind(self) -> int:
        """Tokens between a prefix and a thought: the rest of the template, the opening delimiter."""
        return math.ceil(len(self.config.method.prompt.partition("{context}")[2]) / _CHARACTERS) + self.opening

    @property
    def written(self) -> int:
        """Tokens of a prediction, which RPT writes behind each thought."""
        return self.config.method.prediction_length if self.config.method.name == "rpt" else 0

    @property
    def trained(self) -> int:
        """Weights that have gradients: all of them, or those of adapters."""
        return self.shape.adapter or self.shape.parameters

    @property
    def teacher(self) -> bool:
        """Whether there is a teacher."""
        return self.config.method.name == "rlp" and self.config.method.teacher_every > 0

    @property
    def shared(self) -> bool:
        """Whether a document is read once for all its thoughts."""
        return self.config.model.prefix == "shared"

    @property
    def windows(self) -> int:
        """Windows of a step, on all GPUs."""
        return self.config.train.batch // self.config.method.positions

    @property
    def windows_here(self) -> int:
        """Windows of a step on the GPU that has most."""
        return math.ceil(self.windows / self.gpus)

    @property
    def rows_here(self) -> int:
        """Thoughts of a step on that GPU."""
        return self.windows_here * self.rows_of_window

    @property
    def rows_of_window(self) -> int:
        """Thoughts in one window."""
        return self.config.method.positions * self.config.method.group

    @property
    def windows_at_once(self) -> int:
        """Windows whose thoughts decode together."""
        return min(max(1, self.config.train.rollout_batch // self.rows_of_window), self.windows_here)

    @property
    def rows_at_once(self) -> int:
        """Thoughts that decode together."""
        return self.windows_at_once * self.rows_of_window

    @property
    def limit(self) -> int:
        """Longest thought and what is written behind it."""
        return self.config.method.thought_length + self.written

    def stops(self, last: int) -> list[int]:
        """Tokens ahead of the positions of a document, evenly spaced, the last behind `last`."""
        count = self.config.method.positions
        return [max(1, round(last * (k + 1) / count)) for k in range(count)]

    def window_work(self) -> Work:
        """The tokens that a typical window takes in one step."""
        method, places = self.config.method, self.config.method.positions
        thought = (round(self.length),) * method.group
        return Work(
            windows=(self.document,),
            owners=(0,) * places,
            prefixes=tuple(self.template + stop for stop in self.stops(self.prefix)),
            opening=self.behind,
            thoughts=(thought,) * places,
            tails=((max(self.written, method.horizon) - 1,) * method.group,) * places,
            sharing="document" if self.shared else "rollout",
            horizon=method.horizon,
            teacher=self.teacher,
            kl=method.kl_weight > 0,
            inner_steps=method.inner_steps,
            written=((self.written,) * method.group,) * places if self.written else (),
        )


def job(config: Config, shape: Shape, words: dict[str, str]) -> Job:
    """The job that a config and the command's own options describe (their names without dashes). Raises UserError.

    Options: gpus, gpu, nodes_of, layout, prefix, document, length, gradients, ceilings, price.
    """
    if config.method.name == "cpt":
        raise UserError("method.name = 'cpt': plan is for methods that think; docs/flops.md counts plain pretraining")
    gpus = _whole("gpus", words.get("gpus", "1"))
    price = _price(words["price"]) if "price" in words else None
    layout = words.get("layout", "one" if gpus == 1 else "ddp")
    if layout not in get_args(Layout):
        raise UserError(f"--layout {layout}: must be {', '.join(get_args(Layout))}")
    if config.lora.r and layout == "fsdp2":
        raise UserError(f"--layout fsdp2: with lora.r = {config.lora.r} what is trained is small; use ddp")
    if (layout == "one") != (gpus == 1):
        raise UserError(f"--layout {layout}: does not go with --gpus {gpus}")
    gradients = words.get("gradients", "fp32")
    if gradients not in ("fp32", "bf16"):
        raise UserError(f"--gradients {gradients}: must be fp32 or bf16")
    limit, window = config.method.thought_length, config.corpus.window
    longest = window - config.method.horizon
    typical = longest if config.method.positions > 1 else max(1, longest // 2)  # one position stands anywhere
    prefix = _whole("prefix", words["prefix"]) if "prefix" in words else typical
    document = _whole("document", words["document"]) if "document" in words else prefix + config.method.horizon - 1
    length = _whole("length", words["length"]) if "length" in words else limit
    if prefix > longest:
        raise UserError(f"--prefix {prefix}: must be at most {longest}, corpus.window less its targets")
    if length > limit:
        raise UserError(f"--length {length}: must be at most method.thought_length = {limit}")
    if document > window or document < prefix:
        raise UserError(f"--document {document}: must be from --prefix = {prefix} to corpus.window = {window}")
    return Job(
        config=config,
        shape=shape.adapted(config.lora),
        machine=machine(words.get("gpu", "h100"), words.get("ceilings"), price),
        gpus=gpus,
        per_node=_whole("nodes-of", words.get("nodes_of", "8")),
        layout="fsdp2" if layout == "fsdp2" else "ddp" if layout == "ddp" else "one",
        prefix=prefix,
        document=document,
        longest=prefix if "prefix" in words else longest,
        length=float(length),
        gradient=2 if gradients == "bf16" else 4,
    )


def shipped_shape(path: str) -> Shape | None:
    """The shape of a model whose architecture comes with the package, by its hub id or that file's name; else None."""
    name = Path(path).name.lower().removesuffix("-base").removeprefix("nvidia-")
    file = _SHAPES / f"{name}.json"
    if path.startswith((".", "~", "/")) or Path(path).exists() or not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    absent = dict.fromkeys(_UNUSED) | dict.fromkeys(_COUNTS, 0) | {"moe_intermediate_size": 0}
    absent["moe_shared_expert_intermediate_size"] = 0
    return Shape.of(SimpleNamespace(**(absent | values)))


def with_option(one: Job, section: str, **changes: object) -> Job:
    """The job with some options of a section of its config changed."""
    part = replace(getattr(one.config, section), **changes)
    return replace(one, config=replace(one.config, **{section: part}))


def _whole(option: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"--{option} {text}: must be a whole number of at least 1")
    return int(text)


def _price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise UserError(f"--price {text}: must be dollars per GPU hour")
    return value
