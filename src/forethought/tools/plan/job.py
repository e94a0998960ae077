"""What is planned: a config, the shape of its model, a machine, and the lengths of prefixes and thoughts."""

import json
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass as checked_dataclass

from forethought.config import Config, UserError
from forethought.flops import Shape, Work, forward_flops
from forethought.memory import Device, Layout, Setup, sized
from forethought.run.diagnostics import is_number

_SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine(Device):
    """One GPU (or the CPU) and its interconnect. Rates are peaks, of which the shares are reached."""

    bf16: float  # FLOP/s of a matrix product, dense
    fp32: float  # the same in fp32, without TF32
    bandwidth: float  # bytes/s, read and written
    inside: float = 0.0  # bytes/s that a GPU sends to others in its node
    across: float = 0.0  # bytes/s that a GPU sends to other nodes
    host: float = 25e9  # bytes/s to or from the host's memory: PCIe 4.0 x16, assumed
    price: float = 0.0  # dollars per GPU hour; 0: unknown, no cost is reported
    matmul_share: float = 0.8  # of the peak, in large square products
    copy_share: float = 0.9  # of the bandwidth, in large copies
    link_share: float = 0.8  # of the interconnect, for large messages
    read_share: float = 0.57  # of the matmul rate, in prefill and scoring
    update_share: float = 0.31  # the same in the update
    decode_share: float = 0.4  # of the bound (memory or matmul rate), in decoding
    launch: float = 5e-6  # seconds to launch one kernel from Python
    replay: float = 1.5e-6  # minimum seconds of one small kernel in a CUDA graph
    latency: float = 1e-5  # seconds per hop of a ring
    source: str = ""  # origin of rates and shares

    def matmul(self, precision: str) -> float:
        """FLOP/s that large products reach."""
        return self.matmul_share * (self.bf16 if precision == "bf16" else self.fp32)

    @property
    def copy(self) -> float:
        """Bytes/s that large copies reach."""
        return self.copy_share * self.bandwidth


_ASSUMED = (
    "update and decode shares: one H100 (benchmarks/results/gpu-steps-graphs.json), 0.24 to 0.37 and 0.27 to 0.52; "
    "copy, link, read, launch: assumed"
)
_BUILT_IN = (
    "peaks: vendors' data sheets, dense; matmul share: best bf16 product in the accelerator table of "
    f"github.com/stas00/ml-engineering (torch 2.6 to 2.7); {_ASSUMED}"
)
_UNMEASURED = f"peaks: vendors' data sheets, dense; all shares assumed, matmul too; {_ASSUMED}"
_FIELDS = ("memory", "bf16", "fp32", "bandwidth", "inside", "across", "matmul_share", "source")
_DATA_SHEETS: dict[str, tuple[Any, ...]] = {
    "a100-40": (40e9, 312e12, 19.5e12, 1.555e12, 300e9, 25e9, 0.869, _BUILT_IN),
    "a100": (80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 0.869, _BUILT_IN),
    "h100": (80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9, 0.803, _BUILT_IN),
    "h200": (141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9, 0.803, _BUILT_IN),
    "b200": (180e9, 2250e12, 75e12, 7.7e12, 900e9, 50e9, 0.776, _BUILT_IN),
    "l40s": (48e9, 362e12, 91.6e12, 0.864e12, 32e9, 25e9, 0.7, _UNMEASURED),
    "rtx-4090": (24e9, 165e12, 82.6e12, 1.008e12, 32e9, 12.5e9, 0.8, _UNMEASURED),
}
MACHINES = {
    name: Machine(name=name, **dict(zip(_FIELDS, values, strict=True))) for name, values in _DATA_SHEETS.items()
}

_MEASURED = {  # figures of a --ceilings file: field of Machine, scale; the last one of a field counts
    "matmul_gflops": ("fp32", 1e9),
    "matmul_bf16_gflops": ("bf16", 1e9),
    "matmul_tflops": ("bf16", 1e12),
    "copy_gb_s": ("bandwidth", 1e9),
    "copy_tb_s": ("bandwidth", 1e12),
    "memory_gb": ("memory", 1e9),
    "inside_gb_s": ("inside", 1e9),
    "across_gb_s": ("across", 1e9),
    "host_gb_s": ("host", 1e9),
    "launch_us": ("launch", 1e-6),
    "replay_us": ("replay", 1e-6),
    "latency_us": ("latency", 1e-6),
    "update_of_matmul": ("update_share", 1.0),
    "read_of_matmul": ("read_share", 1.0),
    "rollout_of_ceiling": ("decode_share", 1.0),
    "decode_of_bound": ("decode_share", 1.0),
}


@checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class Options:
    """The options of `forethought plan`."""

    gpus: PositiveInt = Field(default=1, description="N: GPUs to train on (1)")
    gpu: str = Field(default="h100", description=f"NAME: {', '.join(MACHINES)} or cpu (h100)")
    nodes_of: PositiveInt = Field(default=8, description="N: GPUs per node (8)")
    layout: Layout | None = Field(
        default=None, description="one, ddp or zero1: how the model is distributed over the GPUs (ddp on several)"
    )
    steps: PositiveInt | None = Field(default=None, description="N: train.steps")
    prefix: PositiveInt | None = Field(
        default=None,
        description="TOKENS: before the last position of a document (P; half of corpus.window, with K > 1 all of it)",
    )
    document: PositiveInt | None = Field(
        default=None, description="TOKENS: read by the teacher of a document (its prefix)"
    )
    length: PositiveInt | None = Field(
        default=None, description="TOKENS: mean length of a thought (L; method.thought_length)"
    )
    gradients: Literal["fp32", "bf16"] = Field(default="fp32", description="fp32 or bf16 (fp32)")
    ceilings: str = Field(
        default="", description="FILE: measurements of the machine: benchmarks/step.py --json FILE, or one object"
    )
    price: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(default=0.0, description="DOLLARS: per GPU hour")
    json: str = Field(default="", description="FILE: write all figures there")
    simulate: bool = Field(
        default=False, description="also simulate the step on 1 to 1,024 GPUs, with thoughts of unequal lengths"
    )
    lengths: str = Field(default="", description="RUN: sample these lengths from a run's thoughts.jsonl (a lognormal)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Setup):
    """A run to plan. `prefix`, `document` and `length` are typical, limits the config's."""

    machine: Machine
    gpus_per_node: int = 8
    prefix: int  # before the last position of a document, without the template
    document: int  # read by the teacher
    length: float  # mean length of a thought, with the sampled closing delimiter

    def window_work(self) -> Work:
        """The tokens that a typical window takes in one step; its positions are evenly spaced."""
        method, positions = self.config.method, self.config.method.positions
        thought = (round(self.length),) * method.group
        before = [max(1, round(self.prefix * (k + 1) / positions)) for k in range(positions)]
        targets = ((method.horizon - 1 + method.repeat_context,) * method.group,) * positions
        written = ((self.prediction,) * method.group,) * positions if self.prediction else ()
        tails = tuple(tuple(n - 1 for n in group) for group in written) or targets
        return Work(
            windows=(self.document,),
            owners=(0,) * positions,
            prefixes=tuple(self.template + length for length in before),
            opening=self.between,
            thoughts=(thought,) * positions,
            tails=() if self.config.samples_with_vllm else tails,
            sharing="document" if self.shared else "rollout",
            horizon=method.horizon,
            teacher=self.teacher,
            kl=method.kl_weight > 0,
            inner_steps=method.inner_steps,
            predicts=method.prediction_weight > 0,
            reread=targets if self.config.rescores else (),
            written=written,
            proxy=forward_flops(self.shape, [(self.max_prefix, 0)], self.max_prefix) if self.entropies else 0,
        )


def job(config: Config, shape: Shape, options: Options) -> Job:
    """The job of a config and of the command's own options. Raises UserError."""
    config = replace(config, train=replace(config.train, steps=options.steps or config.train.steps))
    method, gpus, layout = config.method, options.gpus, options.layout or ("one" if options.gpus == 1 else "ddp")
    longest = config.corpus.window - method.horizon
    typical = longest if method.positions > 1 else max(1, longest // 2)  # one position may be anywhere
    prefix, length = options.prefix or typical, options.length or method.thought_length
    document = options.document or prefix + method.horizon - 1
    if not method.samples_thoughts:
        raise UserError(f"method.name = {method.name!r}: plan is for methods that sample thoughts; see docs/flops.md")
    if prefix > longest:
        raise UserError(f"--prefix {prefix}: must be at most {longest}, corpus.window less its targets")
    if length > method.thought_length:
        raise UserError(f"--length {length}: must be at most method.thought_length = {method.thought_length}")
    if length < method.shortest_thought:
        raise UserError(f"--length {length}: must be at least method.min_thought_length = {method.min_thought_length}")
    if not prefix <= document <= config.corpus.window:
        raise UserError(
            f"--document {document}: must be from --prefix = {prefix} to corpus.window = {config.corpus.window}"
        )
    if config.lora.r and layout == "zero1":
        raise UserError(f"--layout zero1: with lora.r = {config.lora.r} few parameters are trained; use ddp")
    if (layout == "one") != (gpus == 1):
        raise UserError(f"--layout {layout}: does not fit --gpus {gpus}")
    planned = Job(
        config=config,
        shape=shape.adapted(config.lora),
        machine=machine(options.gpu, options.ceilings, options.price),
        gpus=gpus,
        gpus_per_node=options.nodes_of,
        layout=layout,
        prefix=prefix,
        document=document,
        max_prefix=options.prefix or longest,
        length=float(length),
        gradient_bytes=2 if options.gradients == "bf16" else 4,
    )
    return sized(planned)


def shipped_shape(path: str) -> Shape | None:
    """The shape of a model whose architecture ships with the package, by hub id or file name; None for others."""
    name = Path(path).name.lower().removesuffix("-base").removeprefix("nvidia-")
    file = _SHAPES / f"{name}.json"
    if path.startswith((".", "~", "/")) or Path(path).exists() or not file.is_file():
        return None
    return Shape.of(SimpleNamespace(**json.loads(file.read_text(encoding="utf-8"))))


def machine(name: str, ceilings: str = "", price: float = 0.0) -> Machine:
    """A machine by name, with the measurements of a `ceilings` file in place of the peaks. Raises UserError."""
    name = name.lower()
    if name == "cpu":
        if not ceilings:
            raise UserError("--gpu cpu: needs --ceilings FILE, measured on this CPU by benchmarks/step.py --json FILE")
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        known = Machine(
            name="cpu", memory=memory, bf16=0.0, fp32=0.0, bandwidth=0.0, launch=0.0, inside=1e9, across=1e9,
            source=_ASSUMED,
        )  # fmt: skip
    elif name in MACHINES:
        known = MACHINES[name]
    else:
        raise UserError(f"--gpu {name}: must be {', '.join(MACHINES)} or cpu")
    known = replace(known, price=price)
    return _measured(known, ceilings) if ceilings else known


def _measured(known: Machine, file: str) -> Machine:
    """The machine with the figures of a JSON file."""
    figures = _figures(file)
    found: dict[str, Any] = {field: figures[name] for name, (field, _) in _MEASURED.items() if name in figures}
    if not found.keys() & {"fp32", "bf16"}:
        raise UserError(f"--ceilings {file}: holds no matmul_gflops (fp32) and no matmul_tflops (bf16)")
    if known.name == "cpu" and "bandwidth" not in found:
        raise UserError(f"--ceilings {file}: holds no copy_gb_s")
    fp32 = found.get("fp32", known.fp32 * known.matmul_share)
    bf16 = found.get("bf16", known.bf16 * known.matmul_share)
    changes = {"matmul_share": 1.0, **found, "fp32": fp32 or bf16, "bf16": bf16 or fp32}
    if "bandwidth" in found:
        changes["copy_share"] = 1.0
    if found.keys() & {"inside", "across"}:
        links = {name: getattr(known, name) * known.link_share for name in ("inside", "across")}
        changes = links | changes | {"link_share": 1.0}
    names = ", ".join(name for name in _MEASURED if name in figures)
    return replace(known, **changes, source=f"measured ({names}): {file}; all else {known.source}")


def _figures(file: str) -> dict[str, float]:
    """The known figures of a file in plain units (bytes, FLOPs, seconds): one object, or rows of a benchmark.

    Of several rows it takes the best rates, since a busy machine only lowers them, and the median of the shares.
    """
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--ceilings {file}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--ceilings {file}: is not valid JSON") from None
    rows, found = [rows] if isinstance(rows, dict) else rows, {}
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"--ceilings {file}: must hold an object, or the rows of benchmarks/step.py")
    for name, (_, scale) in _MEASURED.items():
        values = [row[name] for row in rows if name in row]
        for value in values:
            if not is_number(value) or value < 0 or (value == 0 and not name.endswith("_us")):
                raise UserError(f"--ceilings {file}: {name} = {value!r}: must be a number above 0")
        if values:
            best = statistics.median if "_of_" in name else min if name.endswith("_us") else max
            found[name] = best(value * scale for value in values)
    return found
