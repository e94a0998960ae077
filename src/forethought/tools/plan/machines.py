"""What a machine can do: peaks from vendors' data sheets, the share of them that is reached, or what was measured."""

import json
import math
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forethought.config import UserError

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One GPU (or the CPU) and the links to its peers. Rates are peaks, of which the shares are reached."""

    name: str
    memory: float  # bytes
    bf16: float  # FLOP/s of a matrix product, without sparsity
    fp32: float  # the same in fp32, as torch multiplies by default (no TF32)
    bandwidth: float  # bytes/s, read and written
    inside: float = 0.0  # bytes/s that a GPU sends to its peers in one node
    across: float = 0.0  # bytes/s that a GPU sends to other nodes
    price: float = 0.0  # dollars per GPU hour; 0: not known, no cost is told
    matmul_share: float = 0.8  # of the peak, by large square products
    copy_share: float = 0.9  # of the bandwidth, by large copies
    link_share: float = 0.8  # of the links, by large messages
    read_share: float = 0.57  # of the matmul rate, by reading many tokens at once: prefill, score
    update_share: float = 0.31  # the same of the update
    decode_share: float = 0.4  # of the bound (memory or matmul rate), by decoding
    launch: float = 5e-6  # seconds to start one kernel from Python
    replay: float = 1.5e-6  # seconds that one small kernel of a captured step takes at least
    latency: float = 1e-5  # seconds for one message of a ring
    source: str = ""  # where rates and shares are from

    def matmul(self, precision: str) -> float:
        """FLOP/s that large products reach."""
        return self.matmul_share * (self.bf16 if precision == "bf16" else self.fp32)

    @property
    def copy(self) -> float:
        """Bytes/s that large copies reach."""
        return self.copy_share * self.bandwidth

    @property
    def usable(self) -> float:
        """Bytes that tensors may take: 6 % is left to fragmentation, 1 GiB of a GPU to its context and libraries."""
        return 0.94 * self.memory - (0 if self.name == "cpu" else GIB)


SOURCES = (
    "peaks: vendors' data sheets, dense; matmul share: best bf16 product in the accelerator table of "
    "github.com/stas00/ml-engineering (torch 2.6 to 2.7)"
)
ASSUMED = (
    "update and decode shares: one H100 (benchmarks/results/gpu-steps-graphs.json), 0.24 to 0.37 and 0.27 to 0.52; "
    "copy, link, read, launch: assumed"
)
_BUILT_IN = f"{SOURCES}; {ASSUMED}"
_UNMEASURED = f"peaks: vendors' data sheets, dense; all shares assumed, matmul too; {ASSUMED}"

MACHINES: dict[str, Machine] = {
    one.name: one
    for one in (
        Machine(
            name="a100-40",
            memory=40e9,
            bf16=312e12,
            fp32=19.5e12,
            bandwidth=1.555e12,
            inside=300e9,
            across=25e9,
            matmul_share=0.869,
            source=_BUILT_IN,
        ),
        Machine(
            name="a100",
            memory=80e9,
            bf16=312e12,
            fp32=19.5e12,
            bandwidth=2.039e12,
            inside=300e9,
            across=25e9,
            matmul_share=0.869,
            source=_BUILT_IN,
        ),
        Machine(
            name="h100",
            memory=80e9,
            bf16=989e12,
            fp32=67e12,
            bandwidth=3.35e12,
            inside=450e9,
            across=50e9,
            matmul_share=0.803,
            source=_BUILT_IN,
        ),
        Machine(
            name="h200",
            memory=141e9,
            bf16=989e12,
            fp32=67e12,
            bandwidth=4.8e12,
            inside=450e9,
            across=50e9,
            matmul_share=0.803,
            source=_BUILT_IN,
        ),
        Machine(
            name="b200",
            memory=180e9,
            bf16=2250e12,
            fp32=75e12,
            bandwidth=7.7e12,
            inside=900e9,
            across=50e9,
            matmul_share=0.776,
            source=_BUILT_IN,
        ),
        Machine(
            name="l40s",
            memory=48e9,
            bf16=362e12,
            fp32=91.6e12,
            bandwidth=0.864e12,
            inside=32e9,
            across=25e9,
            matmul_share=0.7,
            source=_UNMEASURED,
        ),
        Machine(
            name="rtx-4090",
            memory=24e9,
            bf16=165e12,
            fp32=82.6e12,
            bandwidth=1.008e12,
            inside=32e9,
            across=12.5e9,
            matmul_share=0.8,
            source=_UNMEASURED,
        ),
    )
}

_SCALES = {
    "matmul_gflops": 1e9,
    "matmul_bf16_gflops": 1e9,
    "matmul_tflops": 1e12,
    "copy_gb_s": 1e9,
    "copy_tb_s": 1e12,
    "memory_gb": 1e9,
    "inside_gb_s": 1e9,
    "across_gb_s": 1e9,
    "launch_us": 1e-6,
    "replay_us": 1e-6,
    "latency_us": 1e-6,
    "update_of_matmul": 1.0,
    "read_of_matmul": 1.0,
    "decode_of_bound": 1.0,
    "rollout_of_ceiling": 1.0,
}
_SHARES = ("update_of_matmul", "read_of_matmul", "decode_of_bound", "rollout_of_ceiling")


def machine(name: str, ceilings: str | None = None, price: float | None = None) -> Machine:
    """The machine of a name, with what was measured of it in place of the peaks. Raises UserError."""
    name = name.lower()
    if name == "cpu":
        if ceilings is None:
            raise UserError(
                "--gpu cpu: needs --ceilings FILE, what benchmarks/step.py --json FILE measured on this CPU"
            )
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        # one process a machine, and no links: --ceilings may say otherwise
        known = Machine(
            name="cpu",
            memory=memory,
            bf16=0.0,
            fp32=0.0,
            bandwidth=0.0,
            launch=0.0,
            inside=1e9,
            across=1e9,
            source=ASSUMED,
        )
    elif name in MACHINES:
        known = MACHINES[name]
    else:
        raise UserError(f"--gpu {name}: must be {', '.join(MACHINES)} or cpu")
    if price is not None:
        known = replace(known, price=price)
    return known if ceilings is None else measured(known, ceilings)


def measured(known: Machine, file: str) -> Machine:
    """The machine with the figures of a JSON file: rows of benchmarks/step.py or gpu.py, or one object.

    Of several rows the highest rates count, since others on a machine only lower them, and the median of the shares.
    Raises UserError.
    """
    found = _figures(file)
    single, half = found.get("matmul_gflops"), found.get("matmul_tflops", found.get("matmul_bf16_gflops"))
    copied = found.get("copy_tb_s", found.get("copy_gb_s"))
    if single is None and half is None:
        raise UserError(f"--ceilings {file}: holds no matmul_gflops (fp32) and no matmul_tflops (bf16)")
    if known.name == "cpu" and copied is None:
        raise UserError(f"--ceilings {file}: holds no copy_gb_s")
    fp32 = known.fp32 * known.matmul_share if single is None else single
    bf16 = known.bf16 * known.matmul_share if half is None else half
    changes: dict[str, Any] = {"matmul_share": 1.0, "fp32": fp32 or bf16, "bf16": bf16 or fp32}
    if copied is not None:
        changes |= {"bandwidth": copied, "copy_share": 1.0}
    if found.keys() & {"inside_gb_s", "across_gb_s"}:
        changes |= {"link_share": 1.0, "inside": known.inside * known.link_share}
        changes |= {"across": known.across * known.link_share}
    options = {
        "inside_gb_s": "inside",
        "across_gb_s": "across",
        "memory_gb": "memory",
        "launch_us": "launch",
        "replay_us": "replay",
        "latency_us": "latency",
        "update_of_matmul": "update_share",
        "read_of_matmul": "read_share",
        "rollout_of_ceiling": "decode_share",
        "decode_of_bound": "decode_share",
    }
    changes |= {option: found[key] for key, option in options.items() if key in found}
    names = ", ".join(name for name in _SCALES if name in found)
    return replace(known, **changes, source=f"measured ({names}): {file}; all else {known.source}")


def _figures(file: str) -> dict[str, float]:
    """The known figures of a file in plain units (bytes, FLOPs, seconds)."""
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--ceilings {file}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--ceilings {file}: is not valid JSON") from None
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"--ceilings {file}: must hold an object, or the rows of benchmarks/step.py")
    values: dict[str, list[float]] = {}
    for row in rows:
        for name in _SCALES.keys() & row.keys():
            value = row[name]
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and not name.endswith("_us")):
                raise UserError(f"--ceilings {file}: {name} = {value!r}: must be a number above 0")
            values.setdefault(name, []).append(value * _SCALES[name])
    best = {name: min(some) if name.endswith("_us") else max(some) for name, some in values.items()}
    return best | {name: statistics.median(values[name]) for name in _SHARES if name in values}
