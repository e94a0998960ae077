"""The tables and lines of a plan, as the command line prints them."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from forethought.memory import SCANS, chunk_tokens, offloaded
from forethought.tools.plan import Plan
from forethought.tools.plan.timing import ASSUMPTIONS, Scale

_LAYOUTS = {"one": "one process", "ddp": "data parallel", "zero1": "ZeRO-1"}
_GROUPS = {"held": "held throughout", "decode": "decoding", "score": "teacher scoring", "update": "update"}


def shown(result: Plan) -> list[Table | str]:
    """A plan's output, in order."""
    found = [*_head(result), _memory(result), _largest(result), _time(result), *_totals(result)]
    if result.changes or not result.fits:
        found += _changes(result)
    if result.lengths is not None:
        found += _simulation(result, result.lengths.source)
    return found


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """The first column is text, the others are figures. A row of one cell is a heading."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 1)
    for row in rows:
        table.add_row(*([Text(row[0], style="bold")] if len(row) == 1 else row))
    return table


def _head(result: Plan) -> list[str]:
    job, method, train = result.job, result.job.config.method, result.job.config.train
    where = f"{job.gpus} x {job.machine.name}" + (f" in nodes of {job.gpus_per_node}" if job.gpus > 1 else "")
    trained = f", only {_count(job.trainable)} of adapters trained" if job.shape.adapter else ""
    return [
        f"{job.config.model.path}: {_count(job.shape.parameters)} parameters{trained}, {job.config.model.precision}; "
        f"{where}, {_LAYOUTS[job.layout]}; {result.steps} steps",
        f"a step: {train.batch} positions (K = {method.positions}), G = {method.group}; typical prefix P = "
        f"{job.prefix} and thought L = {job.length:.0f} tokens, longest {job.max_prefix} and {method.thought_length}",
        f"on one GPU: {job.local_thoughts} thoughts a step, {job.decode_rows} decoded at once; chunks of "
        f"{chunk_tokens(job)} tokens in the update",
        f"All figures are estimates (docs/planning.md). {job.machine.source}.",
    ]


def _memory(result: Plan) -> Table:
    layouts = result.memory if result.job.gpus > 1 else {"one": result.memory["one"]}
    rows: list[Sequence[str]] = []
    for group, title in _GROUPS.items():
        by_layout = [getattr(parts, group) for parts in layouts.values()]
        names = dict.fromkeys(name for parts in by_layout for name in parts)
        sizes = {name: [parts.get(name, 0.0) for parts in by_layout] for name in names}
        if any(map(any, sizes.values())):
            rows.append([title])
        rows += [[f"  {name}", *map(_gb, values)] for name, values in sizes.items() if any(values)]
    peaks, usable = [parts.peak for parts in layouts.values()], result.job.machine.usable
    rows += [["peak", *map(_gb, peaks)], ["fits", *(_yes(peak <= usable) for peak in peaks)]]
    heads = [_LAYOUTS[name] + (f"\non {result.job.gpus}" if name != "one" else "") for name in layouts]
    return _table(("memory per GPU, GB", *heads), rows)


def _largest(result: Plan) -> str:
    machine, largest = result.job.machine, result.largest
    usable = f"{_gb(machine.usable)} of {_gb(machine.memory)} GB are usable"
    if largest is None:
        return f"{usable}; no batch fits"
    faster = f" (a step in {_seconds(result.faster)} s)" if result.faster else ""
    if moved := sum(offloaded(result.job).values()):
        usable += f", and {_gb(moved)} GB of host memory hold what is idle while thoughts are sampled"
    return (
        f"{usable}; the largest that fit, one at a time: train.rollout_batch {largest['rollout_batch']:,}{faster}, "
        f"train.batch {largest['batch']:,}"
    )


def _time(result: Plan) -> Table:
    step = result.step
    rows = []
    for phase in step.phases:
        if phase.seconds:
            flops, share = f"{phase.flops:.3g}" if phase.flops else "", f"{phase.seconds / step.seconds:.1%}"
            rows.append([phase.name, flops, _seconds(phase.seconds), share, phase.bound])
    rows.append(["step", f"{step.flops:.3g}", _seconds(step.seconds), "", ""])
    return _table(("estimated time of a step", "FLOPs", "seconds", "share", "bound by"), rows)


def _totals(result: Plan) -> list[str]:
    step, job, steps = result.step, result.job, result.steps
    cost = f", ${result.dollars:,.0f} at ${job.machine.price:g}" if job.machine.price else ""
    return [
        f"a step: {step.text:,} tokens of text, {step.thought:,} of thoughts; throughput "
        f"{step.thought / step.seconds:,.0f} thought tokens/s",
        f"{steps} steps: {steps * step.text:,} tokens of text, {steps * step.thought:.3g} of thoughts, "
        f"{steps * step.flops:.3g} FLOPs; T_flop {step.t_flop * steps:.4g} tokens",
        f"estimated {result.hours:,.1f} hours, {result.hours * job.gpus:,.1f} GPU hours{cost}, without evaluation",
    ]


def _changes(result: Plan) -> list[Table | str]:
    usable = result.job.machine.usable
    rows = [
        [change.what, change.costs, _gb(change.saved), _gb(change.peak), _yes(change.peak <= usable)]
        for change in result.changes
    ]
    enough = bool(result.changes) and result.changes[-1].peak <= usable
    lines = ["with all of these it fits" if enough else "even with all of these it does not fit: use a larger GPU"]
    memory = result.memory[result.job.layout]
    if memory.update.get(SCANS, 0) > 0.2 * memory.phases["update"]:
        lines.append("the mamba_ssm kernels use less memory than the plain scan counted here; not measured")
    if (other := result.adapters) is not None:
        fits = "it fits" if other.peak <= usable else "it does not fit either"
        lines.append(f"or: with {other.what} {fits}, peak {_gb(other.peak)} GB ({other.costs})")
    columns = ("it does not fit; change, in this order", "cost", "saves, GB", "peak, GB", "fits")
    return [_table(columns, rows), *lines]


def _simulation(result: Plan, lengths: str) -> list[Table | str]:
    heads = ("positions", "step, s", "compute", "wait", "network", "efficiency")
    return [
        _table(("weak scaling", *heads), map(_scale, result.weak)),
        _table(("strong scaling", *heads), map(_scale, result.strong)),
        f"simulated, not measured; thoughts: {lengths}. Assumed:",
        *(f"  - {line}" for line in ASSUMPTIONS),
    ]


def _scale(row: Scale) -> list[str]:
    times = map(_seconds, (row.seconds, row.work, row.waits, row.sync))
    return [f"{row.gpus:,} GPU{'s' if row.gpus > 1 else ''}", f"{row.positions:,}", *times, f"{row.efficiency:.0%}"]


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _gb(value: float) -> str:
    return f"{value / 1e9:,.2f}"


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _count(value: int) -> str:
    return f"{value / 1e9:.2f}B" if value >= 1e9 else f"{value / 1e6:.1f}M"
