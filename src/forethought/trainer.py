"""The loop: batches, backward, clip, step, sync, checkpoint. Lines 14 and 15 of Algorithm 1 live here."""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from forethought.algo import METHODS, Collected, Method, Sums, add, means
from forethought.config import Config, Parallel, RunError, UserError, from_dict, to_dict
from forethought.data import corpus
from forethought.data.positions import thought_format
from forethought.eval import heldout
from forethought.models import lora, sharding
from forethought.models.flops import Flops, step_flops, t_flop
from forethought.models.loading import carry, check_length, load_tokenizer
from forethought.models.shape import Shape
from forethought.rollout import engine
from forethought.run import checkpoint, distributed
from forethought.run.callbacks import Callbacks, NoCallbacks
from forethought.run.diagnostics import Diagnosis, Watch, of_evaluation
from forethought.run.folder import RunLog, check_free, disk_errors, read_lines
from forethought.run.signals import SignalArrived, SignalGuard, Stopped
from forethought.run.trackers import Tracker, check_tracker
from forethought.tools.report import card


def train(config: Config, observer: Callbacks | None = None) -> dict[str, Any]:
    """Run a config from its start. Returns what summary.json holds. Raises UserError, RunError, Stopped."""
    with distributed.processes(config):
        log = RunLog(Path(config.run))
        distributed.run_on_rank0(lambda: check_free(log.path, config.overwrite))
        trainer = _trainer(config)
        distributed.run_on_rank0(lambda: RunLog.create(config))
        with _held(log):
            return trainer.run(log, observer or NoCallbacks())


def resume(run: str | Path, observer: Callbacks | None = None, parallel: Parallel | None = None) -> dict[str, Any]:
    """Continue a run from its last checkpoint, bit for bit. Raises UserError for a run that is finished or none.

    Any number of processes may do that, whatever it was before, and share the weights (`parallel`) in another way; with
    another number it goes on up to rounding.
    """
    log = RunLog.open(run)
    more = {"parallel": dataclasses.asdict(parallel)} if parallel else {}
    config = from_dict(to_dict(log.config()) | {"run": str(log.path)} | more)
    with distributed.processes(config), _held(log):
        finished, stage = ((log.path / name).is_file() for name in ("summary.json", "stage.json"))
        if distributed.gather(finished)[0]:
            raise distributed.rank0_error(
                UserError(f"--resume {run}: this run is finished; its figures are in summary.json")
            )
        if distributed.gather(stage)[0]:
            again = "begin it again with --overwrite True"
            raise distributed.rank0_error(UserError(f"--resume {run}: is a stage of post-training; {again}"))
        trainer = _trainer(config)
        trainer.restore(log)
        return trainer.run(log, observer or NoCallbacks())


def _trainer(config: Config) -> "Trainer":
    """The trainer of each process. Raises UserError where one cannot be made, or they would not train the same."""
    trainer = distributed.run_on_all_ranks(lambda: Trainer(config))
    assert trainer is not None
    weights = trainer.network.compute.parameters()
    start = sum(float(parameter.detach().sum(dtype=torch.float64)) for parameter in weights)
    found = distributed.gather((start, config))
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


class Trainer:
    """Everything that changes while a run goes on."""

    def __init__(self, config: Config):
        self.config = config
        check_tracker(config)
        corpus.check(config.corpus)
        if config.evaluate.path:
            corpus.check(dataclasses.replace(config.corpus, path=config.evaluate.path), "evaluate.path")
        if self._windows_per_step() < distributed.world_size():
            raise UserError(
                f"train.batch = {config.train.batch}: fewer documents a step than {distributed.world_size()} processes"
            )
        self.tokenizer = load_tokenizer(config.model)
        self.form = thought_format(self.tokenizer, config.method)
        check_length(config, self.form)
        next(corpus.Windows(config.corpus, self.tokenizer, config.seed))  # a corpus of short texts fails now
        self.held_out = heldout.held_out(config, self.tokenizer) if config.evaluate.path else []
        self.network = lora.network(config)
        self.policy = self.network.compute
        self.engine = engine(self.network.compute, self.form, config)
        self.method: Method = METHODS[config.method.name](self.network, self.engine, self.form, self.tokenizer, config)
        if config.parallel.shard == "fsdp2" and distributed.world_size() > 1:
            self.network.shard([one for name, one in self.method.state().items() if name == "teacher"])
        options = config.optim
        self.optimizer = torch.optim.AdamW(
            self.network.weights.parameters(),
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=self.policy.device.type == "cuda" or None,  # in place, without a copy of all weights
        )
        self.stream = corpus.Windows(config.corpus, self.tokenizer, config.seed)
        self.watch = Watch(config.method.inner_steps)
        self.step, self.saved = 0, -1
        self.asked = 0  # the signal on which several processes have agreed to stop
        self.shape, self.cost = Shape.known(self.policy.config), Flops()
        if self.shape is not None and self.network.adapted:
            self.shape = self.shape.with_adapter(self.network.trained)
        if config.train.flops and self.shape is None:
            kind = self.policy.config.model_type
            raise UserError(f"train.flops = {config.train.flops}: the FLOPs of a {kind} model are not known; use steps")
        self.whole = True  # False from a batch's first optimizer step until its last one is taken and logged
        self._seconds, self._started = 0.0, time.perf_counter()

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
    def seconds(self) -> float:
        """Wall time of the run so far, earlier parts of a resumed run included."""
        return self._seconds + time.perf_counter() - self._started

    def run(self, log: RunLog, observer: Callbacks) -> dict[str, Any]:
        """Evaluate, train, evaluate; leave a finished run folder."""
        gate, train = SignalGuard(held=distributed.world_size() > 1), self.config.train
        with Tracker(self.config, log.path) as tracker, gate.installed():
            try:
                before = self._evaluate(log, observer, gate, "before")
                while not self.over:
                    self._step(log, observer, gate, tracker)
                    if self.step % train.checkpoint_every == 0 or self.over:
                        self._save(log)
                    if self.asked:
                        raise SignalArrived(self.asked)
                after = self._evaluate(log, observer, gate, "after")
            except (SignalArrived, UserError, RunError) as error:
                if self.whole and (distributed.world_size() == 1 or isinstance(error, SignalArrived)):
                    self._save(log)  # several processes that did not agree to stop cannot save together
                if isinstance(error, SignalArrived):
                    again = f"forethought train --resume {log.path}"
                    raise Stopped(error.number, f"saved after step {self.step}; go on with: {again}") from None
                raise
            summary = distributed.run_on_rank0(lambda: self._summary(before, after))
            network, to = self.network, {"device": "cpu", "dtype": torch.float32}
            with sharding.whole(network.weights, network.compute, **to) as policy:
                distributed.run_on_rank0(lambda: self._export(log, policy, summary or {}))
        summary = distributed.gather(summary)[0]
        assert summary is not None
        if distributed.is_rank0():
            self._warn(log, observer, of_evaluation(summary, self.step))
            log.write_json("summary.json", summary)
        return summary

    def _step(self, log: RunLog, observer: Callbacks, gate: SignalGuard, tracker: Tracker) -> None:
        """One batch of text: collect, then `inner_steps` times backward, clip, step, and what follows a step."""
        started, cursor, number = time.perf_counter(), self.stream.cursor(), self.step + 1
        self._set_rate(number)
        try:
            with gate.passing():
                windows = self._read()
                batch = self.method.collect(windows, number)
                metrics, sums = self._backward(batch, windows, number)
        except BaseException:
            self.stream.seek(cursor)
            raise
        self.whole = False
        metrics |= self._update()
        first = {name: sums[name] for name in ("objective/mismatch",) if name in sums}  # before any update
        for _ in range(1, self.config.method.inner_steps):
            metrics, sums = self._backward(batch, windows, number)
            metrics, sums = metrics | self._update(), sums | first
        self.step, spent = number, self.cost
        sums, thoughts = self._exchange(batch, batch.sums | sums, gate)
        metrics |= means(sums) | self._rates(sums, time.perf_counter() - started) | self._costs(spent)
        if distributed.is_rank0() and (self.config.train.logs(number) or self.over):
            log.metrics(number, metrics)
            log.thoughts(thoughts)
            self._warn(log, observer, self.watch.see(number, metrics))
            tracker.log(number, metrics)
        self.whole = True
        done = max(self.spent, number / self.config.train.steps)
        observer.step(number, max(number, round(number / done)), metrics)

    def _read(self) -> list[corpus.Window]:
        """The windows of the next step: all of them in every process, which then takes its share."""
        windows = distributed.run_on_all_ranks(lambda: [next(self.stream) for _ in range(self._windows_per_step())])
        assert windows is not None
        return windows

    def _exchange(self, batch: Collected, sums: Sums, gate: SignalGuard) -> tuple[Sums, list[dict[str, Any]]]:
        """Sums and thoughts of all processes; what all of them cost is added up, and a signal to one is one to all."""
        cost = None if self.shape is None else step_flops(self.shape, batch.work)
        told = distributed.gather((sums, batch.thoughts, cost, gate.pending))
        whole: Sums = {}
        for theirs, _, cost, _ in told:
            add(whole, theirs)
            self.cost += cost or Flops()
        self.asked = max(pending for *_, pending in told) if distributed.world_size() > 1 else 0
        rows = sorted((row for _, thoughts, _, _ in told for row in thoughts), key=lambda row: row["number"])
        return whole, rows

    def _warn(self, log: RunLog, observer: Callbacks, found: list[Diagnosis]) -> None:
        """Log and tell what is new; a run that was killed after its evaluation finds the same again."""
        known = read_lines(log.path / "warnings.jsonl") if found else []
        new = [one for one in found if one.row() not in known]
        log.warnings([one.row() for one in new])
        for one in new:
            observer.warning(one)

    def _windows_per_step(self) -> int:
        """Windows that hold train.batch positions, or (cpt) train.batch windows."""
        method = self.config.method
        return self.config.train.batch // (method.positions if method.thinks else 1)

    def _backward(self, batch: Collected, windows: list[corpus.Window], number: int) -> tuple[dict[str, float], Sums]:
        """Gradients of one pass over the batch. A loss or gradient that is no number stops the run (RunError)."""
        self.optimizer.zero_grad(set_to_none=True)
        total, sums = 0.0, Sums()
        for piece in batch.pieces:
            value, more = self.method.backward(piece)
            total += value
            add(sums, more)
        ready = time.perf_counter()
        total = sum(distributed.gather(total))
        if distributed.world_size() > 1:
            sums["time/wait_s"] = (time.perf_counter() - ready, 1)
        norm = self.network.gather_gradients(self.config.optim.gradient_clip or math.inf)
        if not (math.isfinite(total) and math.isfinite(norm)):
            names = ", ".join(dict.fromkeys(window.document for window in windows[:3]))
            good = self.step if self.whole else self.saved
            what = (
                f"step {number}: the loss is {total} and the gradient norm {norm}; its batch began with documents "
                f"{names}; " + (f"the last good state is that of step {good}" if good >= 0 else "no state was saved")
            )
            raise distributed.rank0_error(RunError(what))
        return {"objective/loss": total, "optim/gradient_norm": norm}, sums

    def _set_rate(self, number: int) -> None:
        rate = learning_rate(self.config, number, self.spent)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _update(self) -> dict[str, float]:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # what the next thoughts need is room
        self.network.sync()
        self.method.after_step()
        return {"optim/learning_rate": self.optimizer.param_groups[0]["lr"]}

    def _rates(self, sums: Sums, seconds: float) -> dict[str, float]:
        phases = [sums.get(f"time/{phase}_s", (0.0, 1)) for phase in ("rollout", "score")]
        collect = sum(value / count for value, count in phases)
        figures = {"time/step_s": seconds, "time/update_s": seconds - collect}
        if "rollout/tokens" in sums:
            figures["time/thought_tokens_per_s"] = sums["rollout/tokens"][0] / seconds
            figures["time/positions_per_s"] = self.config.train.batch / seconds
        else:
            figures["time/windows_per_s"] = self.config.train.batch / seconds
        return figures | {
            "corpus/documents": self.stream.documents,
            "corpus/skipped": self.stream.skipped,
            "corpus/tokens": self.stream.tokens,
            "corpus/epoch": self.stream.epoch,
        }

    def _costs(self, before: Flops) -> dict[str, float]:
        if self.shape is None:
            return {}
        return {"cost/flops": float(self.cost.total - before.total), "cost/flops_total": float(self.cost.total)}

    def _evaluate(
        self, log: RunLog, observer: Callbacks, gate: SignalGuard, when: str
    ) -> dict[str, heldout.Records] | None:
        """Held-out records; those of before training are kept in the run folder, so a resumed run has them too."""
        if not self.config.evaluate.path:
            return None
        name = f"evaluation-{when}.json"
        if distributed.gather((log.path / name).is_file())[0]:
            return {group: heldout.Records(**fields) for group, fields in log.read_json(name).items()}
        subject = heldout.Subject(
            model=self.network.compute, engine=self.engine, form=self.form, tokenizer=self.tokenizer, config=self.config
        )
        with gate.passing(), contextlib.ExitStack() as stack:
            if (teacher := self.method.state().get("teacher")) is not None:
                teacher = stack.enter_context(sharding.whole(teacher, self.network.compute))
                subject = dataclasses.replace(subject, teacher=teacher, calling=self.network.calling)
            records = heldout.measure(
                subject, self.held_out, lambda done, total: observer.phase(f"evaluating {when} training", done, total)
            )
        rows = {group: dataclasses.asdict(fields) for group, fields in records.items()}
        distributed.run_on_rank0(lambda: log.write_json(name, rows))
        return records

    def _save(self, log: RunLog) -> None:
        """A checkpoint of this moment, unless there is one."""
        if self.saved == self.step:
            return
        tensors = sharding.kept(self._networks(), self.optimizer)
        state = {"step": self.step, "seconds": self.seconds, "cursor": self.stream.cursor()}
        state["cost"] = dataclasses.asdict(self.cost)
        snapshot = checkpoint.Snapshot(tensors=tensors, state=state)
        checkpoint.save(log.path, self.step, snapshot, self.config.train.keep_checkpoints)
        self.saved = self.step

    def _networks(self) -> dict[str, torch.nn.Module]:
        """Whose weights a checkpoint must hold."""
        return {"policy": self.network.weights, **self.method.state()}

    def restore(self, log: RunLog) -> None:
        """Take up the run's newest checkpoint (or its start, where it has none) and drop what was logged after it."""
        path = distributed.gather(checkpoint.latest(log.path))[0]
        if path is None:
            distributed.run_on_rank0(lambda: log.rewind(0))
            return
        saved = distributed.run_on_all_ranks(lambda: checkpoint.Saved(path, check=distributed.is_rank0()))
        assert saved is not None
        sharding.put_back(saved, self._networks(), self.optimizer)
        self.step = self.saved = saved.state["step"]
        self._seconds = saved.state["seconds"]
        self.cost = Flops(**saved.state["cost"])
        self.stream.seek(saved.state["cursor"])
        self.network.sync()
        self.engine.sync()
        distributed.run_on_rank0(lambda: log.rewind(self.step))
        self.watch.replay(read_lines(log.path / "metrics.jsonl"))

    def _export(self, log: RunLog, policy: Any, summary: dict[str, Any]) -> None:
        """The trained model as a Hugging Face folder, RUN/policy, with how it thinks and a card."""
        partial, final = log.path / ".policy-partial", log.path / "policy"
        shutil.rmtree(partial, ignore_errors=True)
        with disk_errors(log.path, partial), checkpoint.tensor_errors(partial):
            lora.export(policy, partial, self.network, self.config.lora)
            self.tokenizer.save_pretrained(partial)
            carry(partial, self.config)
            (partial / "README.md").write_text(card.text(self.config, summary), encoding="utf-8")
            for file in partial.rglob("*.safetensors"):
                shutil.copymode(partial / "config.json", file)  # safetensors lets nobody but the owner read its files
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

    def _summary(self, before: Any, after: Any) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "method": self.config.method.name,
            "seed": self.config.seed,
            "steps": self.step,
            "seconds": round(self.seconds, 2),
            "trained_parameters": self.network.trained,
            "documents": self.stream.documents,
            "tokens": self.stream.tokens,
            "skipped": self.stream.skipped,
            "t_flop_tokens": self._t_flop(),
        }
        if self.shape is not None:
            figures |= {
                "flops": self.cost.total,
                "flops_rollout": self.cost.rollout,
                "flops_update": self.cost.training,
            }
        for when, records in (("before", before), ("after", after)):
            if records is not None:
                figures |= {f"{when}/{name}": value for name, value in heldout.summarise(records, before).items()}
        return figures

    def _t_flop(self) -> int:
        """The paper's estimate for this run: a thought counts as method.thought_length tokens, text once."""
        method = self.config.method
        thoughts = method.group if method.thinks else 0
        return t_flop(thoughts, method.thought_length, self.config.train.batch, self.step, self.stream.tokens)


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
