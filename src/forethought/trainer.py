"""The training loop: read, collect, backward, clip, step, sync, checkpoint; lines 14 and 15 of Algorithm 1."""

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from forethought.algo import Method, Record
from forethought.algo.metrics import Sums, add_sums, means
from forethought.algo.policy_gradient import Microbatch
from forethought.config import BUDGET, Config, RunError, UserError, changed_on_resume, registry
from forethought.data import corpus
from forethought.data.positions import Positions, thought_format
from forethought.eval import heldout
from forethought.flops import Flops, Shape, step_flops, t_flop
from forethought.memory import Device, Setup, sized
from forethought.models import lora, offload, sharding
from forethought.models.loading import (
    check_context_length,
    device,
    load_architecture,
    load_tokenizer,
    save_thinking_options,
)
from forethought.models.logprobs import chunk_tokens
from forethought.rollout import Thoughts, engine
from forethought.rollout.native import NativeEngine
from forethought.run import checkpoint, distributed
from forethought.run.diagnostics import (
    Diagnosis,
    Monitor,
    diagnose_evaluation,
    diagnose_resume,
    diagnose_split,
    diagnose_text,
)
from forethought.run.folder import RunLog, check_free, read_lines
from forethought.run.signals import SignalArrived, SignalGuard, Stopped
from forethought.run.trackers import Callbacks, Tracker, check_tracker

TERM_NORMS_EVERY = 50
"""Steps between measurements of the gradient norm of each term, which take a pass of the update each."""
LESS_MEMORY = "a smaller update.tokens_per_chunk or train.rollout_batch, update.checkpointing True and model.device cpu"


class OutOfMemory(RunError):
    """The GPU's memory ran out; where there is one process, the state is saved."""

    def __init__(self, what: str, sizes: tuple[int, int]):
        super().__init__(what)
        self.sizes = sizes  # thoughts and tokens at once; 0 where none are sampled


def train(config: Config, callbacks: Callbacks | None = None) -> dict[str, Any]:
    """Run a config from its start. Returns what summary.json holds. Raises UserError, RunError, Stopped.

    If memory runs out at sizes that were chosen here, a single process goes on once with half of them.
    """
    callbacks = callbacks or Callbacks()
    try:
        return _begin(config, callbacks)
    except OutOfMemory as error:
        if all(_sizes(config)) or distributed.launcher_rank_and_size()[1] > 1:
            raise
        halves = [size and max(1, size // 2) for size in error.sizes]
    _free_memory()
    return resume(config.run, callbacks, _with_sizes(config, halves))


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU


def _begin(config: Config, callbacks: Callbacks) -> dict[str, Any]:
    with distributed.process_group(config):
        log = RunLog(Path(config.run))
        distributed.run_on_rank0(lambda: check_free(log.path, config.overwrite))
        *sizes, free = _fitting_sizes(config)
        chosen = _with_sizes(config, sizes)
        trainer = _trainer(chosen)
        distributed.run_on_rank0(lambda: RunLog.create(chosen))
        if any(sizes):
            where = f"({free / 1e9:.1f} GB free)" if free else "(fixed on a CPU)"
            callbacks.note(f"train.rollout_batch = {sizes[0]}, update.tokens_per_chunk = {sizes[1]} {where}")
        with _held(log):
            return trainer.run(log, callbacks)


def _sizes(config: Config) -> tuple[int, int]:
    return config.train.rollout_batch, config.update.tokens_per_chunk


def _with_sizes(config: Config, sizes: Sequence[int]) -> Config:
    """The config with these sizes in place of 0."""
    rows, tokens = (own or other for own, other in zip(_sizes(config), sizes, strict=True))
    train = dataclasses.replace(config.train, rollout_batch=rows)
    return dataclasses.replace(config, train=train, update=dataclasses.replace(config.update, tokens_per_chunk=tokens))


def _fitting_sizes(config: Config) -> list[int]:
    """The sizes that fit on all ranks, and the free bytes; 0 where both are given or memory is not modelled."""
    if all(_sizes(config)):
        return [0, 0, 0]
    found = distributed.all_gather(distributed.run_on_all_ranks(lambda: _fitting_here(config)))
    return [min(column) for column in zip(*found, strict=True)]


def _fitting_here(config: Config) -> tuple[int, int, int]:
    """The same of this rank."""
    method, ranks = config.method, distributed.world_size()
    modelled = method.samples_thoughts and method.name != "mixed" and config.rollout.engine == "native"
    try:
        where, shape = device(config.model), Shape.known(load_architecture(config.model))
        shape = shape and shape.adapted(config.lora)
    except UserError:  # reported when the model is loaded, after what comes before it
        return 0, 0, 0
    if shape is None or not modelled:
        return 0, 0, 0
    free = torch.cuda.mem_get_info(where)[0] + torch.cuda.memory_reserved(where) if where.type == "cuda" else 0
    job = Setup(
        config=config,
        shape=shape,
        machine=Device(name=where.type, memory=float(free)),
        gpus=ranks,
        layout="one" if ranks == 1 else "zero1" if config.parallel.shard == "zero1" else "ddp",
        max_prefix=config.corpus.window - method.horizon,
    )
    return *_sizes(sized(job).config), free


def resume(run: str | Path, callbacks: Callbacks | None = None, config: Config | None = None) -> dict[str, Any]:
    """Continue a run from its last checkpoint, bit for bit. Raises UserError for a run that is finished or none.

    Any number of processes may do that, whatever it was before; with another number it goes on up to rounding. `config`
    may differ from the run's where `changed_on_resume` allows it; the run folder keeps it and warns of the changes.
    """
    log, callbacks = RunLog.open(run), callbacks or Callbacks()
    saved = log.config()
    config = dataclasses.replace(config or saved, run=str(log.path))
    config = _with_sizes(config, _sizes(saved))
    changes = changed_on_resume(saved, config)
    with distributed.process_group(config), _held(log):
        reasons = {
            "summary.json": "this run is finished; its figures are in summary.json",
            "stage.json": "is a stage of post-training; begin it again with --overwrite True",
        }
        for name, why in reasons.items():
            if distributed.all_gather((log.path / name).is_file())[0]:
                raise distributed.rank0_error(UserError(f"--resume {run}: {why}"))
        trainer = _trainer(config)
        found = trainer.restore(log, moved="corpus.path" in changes)
        distributed.run_on_rank0(lambda: trainer.record_changes(log, callbacks, changes, found))
        return trainer.run(log, callbacks)


def _trainer(config: Config) -> "Trainer":
    """The trainer of each process. Raises UserError where one cannot be made, or they would not train the same."""
    trainer = distributed.run_on_all_ranks(lambda: Trainer(config))
    found = distributed.all_gather((trainer.start, config))
    if any(other != found[0] for other in found):
        raise distributed.rank0_error(
            UserError("the processes do not see the same model and options; give each the same files")
        )
    return trainer


@contextlib.contextmanager
def _held(log: RunLog) -> Iterator[None]:
    """The lock of the run folder, which the first process holds for all."""
    with contextlib.ExitStack() as stack:
        distributed.run_on_rank0(lambda: stack.enter_context(log.lock()))
        yield


class TimedEngine:
    """An engine whose sampling time is added up in `seconds`. What `offload` moves is away while it samples."""

    def __init__(self, engine: Any):
        self.engine, self.seconds = engine, 0.0
        self.offload: offload.Offload | None = None

    def make_room(self, moved: offload.Offload) -> None:
        """Move what is idle from now on; buffers of CUDA graphs are freed after each call, to take turns with it."""
        self.offload = moved
        if isinstance(self.engine, NativeEngine):
            self.engine.keep_buffers = False

    def sample(self, positions: Positions, noise: torch.Tensor, writing: torch.Tensor | None = None) -> Thoughts:
        """The engine's `sample`."""
        started, more = time.perf_counter(), () if writing is None else (writing,)
        with self.offload.away() if self.offload else contextlib.nullcontext():
            thoughts = self.engine.sample(positions, noise, *more)
        self.seconds += time.perf_counter() - started
        return thoughts

    def sync(self) -> None:
        """The engine's `sync`."""
        self.engine.sync()


class Trainer:
    """Everything that changes during a run."""

    def __init__(self, config: Config):
        self.config = config
        check_tracker(config)
        corpus.check_corpus(config.corpus)
        if config.evaluate.path:
            corpus.check_corpus(dataclasses.replace(config.corpus, path=config.evaluate.path), "evaluate.path")
        if self._windows_per_step() < distributed.world_size():
            raise UserError(
                f"train.batch = {config.train.batch}: fewer documents a step than {distributed.world_size()} processes"
            )
        self.tokenizer = load_tokenizer(config.model)
        self.form = thought_format(self.tokenizer, config.method)
        check_context_length(config, self.form)
        next(corpus.Windows(config.corpus, self.tokenizer, config.seed))  # a corpus of short texts fails now
        self.held_out = heldout.held_out(config, self.tokenizer) if config.evaluate.path else []
        self.network = lora.load_network(config)
        self.policy = self.network.model
        norms = (torch.linalg.vector_norm(one.detach(), 1, dtype=torch.float64) for one in self.policy.parameters())
        self.start = float(sum(norms))  # the sum of |w|, by which a resumed run knows the weights that it began with
        self.engine = TimedEngine(engine(self.network.model, self.form, config))
        method = registry.load("method", config.method.name)
        made: Any = method(self.network, self.engine, self.form, self.tokenizer, config)
        self.method: Method = made
        self.sampler = self.engine
        if isinstance(own := getattr(made, "engine", None), NativeEngine):  # of mixed, for the frozen start
            made.engine = self.sampler = TimedEngine(own)
        if config.parallel.shard == "zero1" and torch.distributed.is_initialized():
            self.network.shard([one for name, one in self.method.state().items() if name == "teacher"])
        options = config.optim
        self.optimizer = torch.optim.AdamW(
            self.network.weights.parameters(),
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=self.policy.device.type == "cuda" or None,  # in place, without a copy of all weights
        )
        self.offload = self._offload()
        if self.offload:
            self.engine.make_room(self.offload)
        self.stream = corpus.Windows(config.corpus, self.tokenizer, config.seed)
        self.monitor = Monitor(config.method.inner_steps)
        self.step, self.saved = 0, -1
        self.stop_signal = 0  # the signal on which all ranks have agreed to stop
        self.shape, self.cost = Shape.known(self.policy.config), Flops()
        if self.shape is not None and self.network.has_adapters:
            self.shape = self.shape.with_adapter(self.network.num_trainable)
        if config.train.flops and self.shape is None:
            kind = self.policy.config.model_type
            raise UserError(f"train.flops = {config.train.flops}: the FLOPs of a {kind} model are not known; use steps")
        self.consistent = True  # False from a batch's first optimizer step until its last one is taken and logged
        self._seconds, self._started = 0.0, time.perf_counter()

    def _offload(self) -> offload.Offload | None:
        """What moves idle tensors to the host, where that is wanted and saves anything."""
        config, network, device = self.config, self.network, self.policy.device
        if not (config.update.offload and config.method.samples_thoughts and device.type in offload.DEVICES):
            return None
        masters = [network.weights] if network.weights is not network.model else []  # else they sample
        return offload.Offload(device, [*masters, *self.method.state().values()], self.optimizer)

    @property
    def spent(self) -> float:
        """Share of the budget of tokens or FLOPs (whichever ends first) that is used up; 0 where there is none."""
        train = self.config.train
        read = self.stream.tokens / train.tokens if train.tokens else 0.0
        return max(read, self.cost.total / train.flops) if train.flops else read

    @property
    def over(self) -> bool:
        """Whether the run's last step is done."""
        return self.step == self.config.train.steps or self.spent >= 1

    @property
    def _logged(self) -> bool:
        """Whether the current step is logged. Known once its FLOPs are counted."""
        return self.config.train.logs(self.step) or self.over

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, earlier parts of a resumed run included."""
        return self._seconds + time.perf_counter() - self._started

    def run(self, log: RunLog, callbacks: Callbacks) -> dict[str, Any]:
        """Evaluate, train, evaluate; leave a finished run folder."""
        guard, train = SignalGuard(deferred=distributed.world_size() > 1), self.config.train
        with Tracker(self.config, log.path) as tracker, guard.installed():
            try:
                both = self.config.corpus, self.config.evaluate.path
                distributed.run_on_rank0(lambda: self._warn(log, callbacks, diagnose_split(corpus.trained_on(*both))))
                before = self._evaluate(log, callbacks, guard, "before")
                while not self.over:
                    self._step(log, callbacks, guard, tracker)
                    if self.step % train.checkpoint_every == 0 or self.over:
                        self._save(log)
                    if self.stop_signal:
                        raise SignalArrived(self.stop_signal)
                after = self._evaluate(log, callbacks, guard, "after")
            except (SignalArrived, UserError, RunError, torch.OutOfMemoryError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    _free_memory()
                if self.consistent and (distributed.world_size() == 1 or isinstance(error, SignalArrived)):
                    self._save(log)  # ranks that did not agree to stop cannot save together
                if isinstance(error, SignalArrived):
                    again = f"forethought train --resume {log.path}"
                    raise Stopped(error.number, f"saved after step {self.step}; go on with: {again}") from None
                if isinstance(error, torch.OutOfMemoryError):
                    good = f"saved after step {self.saved}" if self.saved >= 0 else "no state was saved"
                    what = f"{str(error).partition('. ')[0]} after step {self.step}; {good}"
                    what += f"; train --resume {log.path} takes {LESS_MEMORY}"
                    samples = self.config.method.samples_thoughts or self.config.evaluate.path
                    tokens = chunk_tokens(self.policy, self.config.update.tokens_per_chunk)
                    raise OutOfMemory(what, (train.rows if samples else 0, tokens)) from error
                raise
            network, to = self.network, {"device": "cpu", "dtype": torch.float32}
            with sharding.full_model(network.weights, network.model, **to) as policy:
                distributed.run_on_rank0(lambda: self._export(log, policy))
        summary = distributed.all_gather(self._summary(before, after))[0]
        if distributed.is_rank0():
            self._warn(log, callbacks, diagnose_evaluation(summary, self.step))
            log.write_json("summary.json", summary)
        return summary

    def _step(self, log: RunLog, callbacks: Callbacks, guard: SignalGuard, tracker: Tracker) -> None:
        """One step: read text, collect, then `inner_steps` times backward, clip, optimizer step and sync."""
        started, cursor, number = time.perf_counter(), self.stream.cursor(), self.step + 1
        rate = learning_rate(self.config, number, self.spent)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            with guard.interruptible():
                # every rank reads all windows of the step and takes its share later
                windows = distributed.run_on_all_ranks(lambda: list(islice(self.stream, self._windows_per_step())))
                record, microbatches, sums = self._collect(windows, number)
                norms = self._term_norms(microbatches, number)
                metrics, more = self._backward(microbatches, windows, number)
        except BaseException:
            self.stream.seek(cursor)
            raise
        self.consistent = False
        metrics |= self._update()
        first = {name: more[name] for name in ("objective/mismatch",) if name in more}  # before any update
        for _ in range(1, self.config.method.inner_steps):
            metrics, more = self._backward(microbatches, windows, number)
            metrics, more = metrics | self._update(), more | first
        self.step, spent = number, self.cost
        sums, rows = self._gather(record, sums | more, guard)
        metrics |= norms | means(sums) | self._rates(sums, time.perf_counter() - started, spent)
        if distributed.is_rank0() and number == 1:
            tokens, unknown = [token for window in windows for token in window.tokens], self.tokenizer.unk_token_id
            self._warn(log, callbacks, diagnose_text(tokens, unknown, self.tokenizer.unk_token))
        if distributed.is_rank0() and self._logged:
            log.append("metrics", [{"step": number, **metrics}])
            log.append("thoughts", [{"step": number, **row} for row in rows])
            self._warn(log, callbacks, self.monitor.observe(number, metrics))
            tracker.log(number, metrics, rows)
        self.consistent = True
        if self.offload:
            self.offload.start()
        done = max(self.spent, number / self.config.train.steps)
        callbacks.step(number, max(number, round(number / done)), metrics)

    def _collect(self, windows: list[corpus.Window], number: int) -> tuple[Record, Sequence[Any], Sums]:
        """What the step is trained on, and how long its phases took."""
        started, sampling = time.perf_counter(), self.sampler.seconds
        record = self.method.collect(windows, number)
        microbatches = self.method.microbatches(record)
        sums = record.metrics()
        if sampled := self.sampler.seconds - sampling:
            sums["time/rollout_s"] = (sampled, 1)
            sums["time/score_s"] = (time.perf_counter() - started - sampled, 1)
        return record, microbatches, sums

    def _gather(self, record: Record, sums: Sums, guard: SignalGuard) -> tuple[Sums, list[dict[str, Any]]]:
        """Metrics and logged rows of all ranks. Adds up their FLOPs, and passes a signal to one rank on to all."""
        if self.shape is not None:
            for flops in distributed.all_gather(step_flops(self.shape, record.work(self.form, self.config))):
                self.cost += flops
        rows: list[dict[str, Any]] = []
        if self._logged:
            more, rows = record.text(self.tokenizer, self.form, self.config.train.log_thoughts)
            sums = sums | more
        gathered = distributed.all_gather((sums, rows, guard.pending))
        total: Sums = {}
        for theirs, _, _ in gathered:
            add_sums(total, theirs)
        self.stop_signal = max(pending for *_, pending in gathered) if distributed.world_size() > 1 else 0
        return total, sorted((row for _, some, _ in gathered for row in some), key=lambda row: row["number"])

    def _warn(self, log: RunLog, callbacks: Callbacks, found: list[Diagnosis]) -> None:
        """Log and report new warnings; a run that was killed after its evaluation finds the same ones again."""
        for row in log.warn(list(map(dataclasses.asdict, found))):
            callbacks.warning(Diagnosis(**row))

    def _windows_per_step(self) -> int:
        """Windows that hold train.batch positions, or (cpt) train.batch windows."""
        method = self.config.method
        return self.config.train.batch // (method.positions if method.samples_thoughts else 1)

    def _backward(
        self, microbatches: Sequence[Any], windows: list[corpus.Window], number: int
    ) -> tuple[dict[str, float], Sums]:
        """Gradients of one pass over the step. A non-finite loss or gradient norm stops the run (RunError)."""
        self.optimizer.zero_grad(set_to_none=True)
        total, sums = 0.0, Sums()
        for microbatch in microbatches:
            value, more = self.method.forward_backward(microbatch)
            total += value
            add_sums(sums, more)
        ready = time.perf_counter()
        total = sum(distributed.all_gather(total))
        if distributed.world_size() > 1:
            sums["time/wait_s"] = (time.perf_counter() - ready, 1)
        norm = self.network.reduce_gradients(self.config.optim.gradient_clip or math.inf)
        if not (math.isfinite(total) and math.isfinite(norm)):
            names = ", ".join(dict.fromkeys(window.document for window in windows[:3]))
            good = self.step if self.consistent else self.saved
            what = (
                f"step {number}: the loss is {total} and the gradient norm {norm}; its batch began with documents "
                f"{names}; " + (f"the last good state is that of step {good}" if good >= 0 else "no state was saved")
            )
            raise distributed.rank0_error(RunError(what))
        return {"objective/loss": total, "optim/gradient_norm": norm}, sums

    def _term_norms(self, microbatches: Sequence[Any], number: int) -> dict[str, float]:
        """On the first and every 50th step, the gradient norm of each term of a loss that has several."""
        if number > 1 and (number % TERM_NORMS_EVERY or not self.config.train.logs(number)):
            return {}
        terms, norms = [one.terms() for one in microbatches if isinstance(one, Microbatch)], {}
        for name in terms[0] if terms else ():
            self.optimizer.zero_grad(set_to_none=True)
            for microbatch in terms:
                self.method.forward_backward(microbatch[name])
            norms[f"optim/gradient_norm_{name}"] = self.network.reduce_gradients(math.inf)
        return norms

    def _update(self) -> dict[str, float]:
        if self.offload:
            self.offload.settle()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # frees memory for the next thoughts
        self.network.sync()
        self.method.after_step()
        self.engine.sync()
        return {"optim/learning_rate": self.optimizer.param_groups[0]["lr"]}

    def _rates(self, sums: Sums, seconds: float, spent: Flops) -> dict[str, float]:
        """Times and throughput of a step, its FLOPs (`spent` before it), and what was read so far."""
        phases = [sums.get(f"time/{phase}_s", (0.0, 1)) for phase in ("rollout", "score")]
        collect = sum(value / count for value, count in phases)
        figures = {"time/step_s": seconds, "time/update_s": seconds - collect}
        if "rollout/tokens" in sums:
            figures["time/thought_tokens_per_s"] = sums["rollout/tokens"][0] / seconds
            figures["time/positions_per_s"] = sums["rollout/length"][1] / self.config.method.group / seconds
        else:
            figures["time/windows_per_s"] = self.config.train.batch / seconds
        if self.shape is not None:
            figures["cost/flops"] = float(self.cost.total - spent.total)
            figures["cost/flops_total"] = float(self.cost.total)
        corpus_metrics = ("documents", "skipped", "bad_rows", "tokens", "epoch")
        return figures | {f"corpus/{name}": getattr(self.stream, name) for name in corpus_metrics}

    def _evaluate(
        self, log: RunLog, callbacks: Callbacks, guard: SignalGuard, when: str
    ) -> dict[str, heldout.Records] | None:
        """Held-out records; those from before training are kept in the run folder for resumed runs."""
        if not self.config.evaluate.path:
            return None
        name = f"evaluation-{when}.json"
        if distributed.all_gather((log.path / name).is_file())[0]:
            saved = log.read_json(name)
            try:
                records = {group: heldout.Records(**fields) for group, fields in saved.items()}
            except TypeError as error:
                raise distributed.rank0_error(UserError(f"{log.path / name}: unexpected content: {error}")) from None
            check = partial(heldout.check_text, records, self.held_out, self.config.evaluate.path, log.path / name)
            distributed.run_on_all_ranks(check)
            return records
        if when == "before" and self.step:
            what = f"{log.path / name}: is missing, and after step {self.step} the start cannot be measured here"
            raise distributed.rank0_error(UserError(f"{what}; put the file back to go on"))
        subject = heldout.Subject(
            model=self.network.model, engine=self.engine, form=self.form, tokenizer=self.tokenizer, config=self.config
        )
        with guard.interruptible(), contextlib.ExitStack() as stack:
            if (teacher := self.method.state().get("teacher")) is not None:
                teacher = stack.enter_context(sharding.full_model(teacher, self.network.model))
                subject = dataclasses.replace(subject, teacher=teacher, as_model=self.network.swapped_weights)
            records = heldout.measure(
                subject, self.held_out, lambda done, total: callbacks.phase(f"evaluating {when} training", done, total)
            )
        rows = {group: dataclasses.asdict(fields) for group, fields in records.items()}
        distributed.run_on_rank0(lambda: log.write_json(name, rows))
        return records

    def _save(self, log: RunLog) -> None:
        """A checkpoint of this moment, unless there is one."""
        if self.saved == self.step:
            return
        if self.offload:
            self.offload.ready()
        tensors = sharding.local_state(self._networks(), self.optimizer)
        state = {"step": self.step, "seconds": self.seconds, "cursor": self.stream.cursor()}
        state |= {"cost": dataclasses.asdict(self.cost), "start": self.start}
        checkpoint.save(log.path, self.step, tensors, state, self.config.train.keep_checkpoints)
        self.saved = self.step

    def _networks(self) -> dict[str, torch.nn.Module]:
        """The networks whose weights a checkpoint holds."""
        return {"policy": self.network.weights, **self.method.state()}

    def restore(self, log: RunLog, moved: bool = False) -> list[str]:
        """Load the run's newest checkpoint, or its start where there is none, and drop what was logged after it.

        Returns the files of the corpus that have changed since. Raises UserError if they did and the corpus has moved.
        """
        path = distributed.all_gather(checkpoint.latest(log.path))[0]
        if path is None:
            if moved:
                what = "corpus.path: without a checkpoint nothing shows that it is the same corpus; begin the run again"
                raise distributed.rank0_error(UserError(f"{what} (--overwrite True), or resume with the old path"))
            distributed.run_on_rank0(lambda: log.rewind(0))
            return []
        saved = distributed.run_on_all_ranks(lambda: checkpoint.Saved(path, check=distributed.is_rank0()))
        start = saved.state.get("start", self.start)  # 0.2 saved none
        if self._keeps_start() and not math.isclose(start, self.start, rel_tol=1e-9):
            what = f"model.path = {self.config.model.path!r}: has other weights than when the run began"
            raise distributed.rank0_error(UserError(f"{what}; put them back, or begin the run again"))
        sharding.load_state(saved, self._networks(), self.optimizer)
        self.step = self.saved = saved.state["step"]
        self._seconds = saved.state["seconds"]
        self.cost = Flops(**saved.state["cost"])
        cursor = saved.state["cursor"]
        self.stream.seek(cursor)
        changed = self.stream.changed(cursor)
        if moved and changed:
            what = f"corpus.path = {self.config.corpus.path!r}: is another corpus than that of the run"
            raise distributed.rank0_error(
                UserError(f"{what} ({changed[0]} differs); resuming cannot change the corpus")
            )
        self.network.sync()
        self.engine.sync()
        distributed.run_on_rank0(lambda: log.rewind(self.step))
        self.monitor.replay(read_lines(log.path / "metrics.jsonl"))
        return changed

    def _keeps_start(self) -> bool:
        """Whether the start stays in use and is in no checkpoint: under adapters, in mixed, as a proxy."""
        method = self.config.method
        proxy = method.samples_thoughts and registry.entry("position_policy", method.policy).proxy
        own = proxy and not (method.proxy or method.kl_weight)  # the KL reference is the proxy, and saved
        return self.network.has_adapters or own or method.name == "mixed"

    def record_changes(
        self, log: RunLog, callbacks: Callbacks, changes: dict[str, tuple[Any, Any]], files: list[str]
    ) -> None:
        """Save the options that a resumed run changes, and warn of them and of files that have changed."""
        raised = not changes.keys().isdisjoint(BUDGET)
        if raised:
            (log.path / "evaluation-after.json").unlink(missing_ok=True)  # of the old end
        if changes:
            log.write_config(self.config)
        self._warn(log, callbacks, diagnose_resume(self.step, changes, raised, files))

    def _export(self, log: RunLog, policy: Any) -> None:
        """The trained model as a Hugging Face folder, RUN/policy, with the options of its thoughts."""
        with checkpoint.exported(log.path) as folder:
            lora.export(policy, folder, self.network, self.config.lora)
            self.tokenizer.save_pretrained(folder)
            save_thinking_options(folder, self.config)

    def _summary(self, before: Any, after: Any) -> dict[str, Any]:
        """What summary.json holds. The paper's T_flop counts method.thought_length tokens per thought, text once."""
        method, read = self.config.method, self.stream.tokens
        thoughts = method.group if method.samples_thoughts else 0
        figures: dict[str, Any] = {
            "method": self.config.method.name,
            "seed": self.config.seed,
            "steps": self.step,
            "seconds": round(self.seconds, 2),
            "trained_parameters": self.network.num_trainable,
            "documents": self.stream.documents,
            "tokens": read,
            "skipped": self.stream.skipped,
            "bad_rows": self.stream.bad_rows,
            "t_flop_tokens": t_flop(thoughts, method.thought_length, self.config.train.batch, self.step, read),
        }
        if self.shape is not None:
            cost = self.cost
            figures |= {"flops": cost.total, "flops_rollout": cost.rollout, "flops_update": cost.training}
        for when, records in (("before", before), ("after", after)):
            if records is not None:
                figures |= {f"{when}/{name}": value for name, value in heldout.summarize(records, before).items()}
        return figures


def learning_rate(config: Config, step: int, spent: float = 0.0) -> float:
    """The rate of a step (from 1): linear warm-up, then constant, or decay to 0 just after train.steps.

    `spent` is the share of a budget of tokens or FLOPs that was used up before: the decay is at least as far on.
    """
    options, last = config.optim, config.train.steps
    if step <= options.warmup:
        return options.learning_rate * step / options.warmup
    done = max((step - options.warmup) / max(last - options.warmup + 1, 1), min(spent, 1.0))
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[options.schedule]
    return options.learning_rate * factor
