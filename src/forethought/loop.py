"""The loop: batches, backward, clip, step, sync, checkpoint. Lines 14 and 15 of Algorithm 1 live here."""

import dataclasses
import math
import shutil
import time
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from forethought import checkpoint, corpus
from forethought.config import Config, RunError, UserError
from forethought.diagnostics import Diagnosis, Watch, of_evaluation
from forethought.evaluation import text
from forethought.flops import Flops, step_flops, t_flop
from forethought.interrupts import Gate, SignalArrived, Stopped
from forethought.methods import METHODS, Collected, Method, Sums, add
from forethought.model import check_length, load_model, load_tokenizer
from forethought.network import Network
from forethought.positions import thought_format
from forethought.rollout.engines import engine
from forethought.runlog import RunLog, check_free, disk_errors, read_lines
from forethought.shape import Shape
from forethought.tracking import Tracker, check_tracker


@runtime_checkable
class Observer(Protocol):
    """Who watches a run: the command line draws a bar, a library user may pass nothing."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress of a part of the run other than training itself."""
        ...

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """A training step is over."""
        ...

    def warning(self, found: Diagnosis) -> None:
        """Something goes wrong; the run goes on."""
        ...


class Silent:
    """An observer that does not look."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Nothing."""

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """Nothing."""

    def warning(self, found: Diagnosis) -> None:
        """Nothing."""


def train(config: Config, observer: Observer | None = None) -> dict[str, Any]:
    """Run a config from its start. Returns what summary.json holds. Raises UserError, RunError, Stopped."""
    check_free(Path(config.run), config.overwrite)
    trainer = Trainer(config)
    log = RunLog.create(config)
    with log.lock():
        return trainer.run(log, observer or Silent())


def resume(run: str | Path, observer: Observer | None = None) -> dict[str, Any]:
    """Continue a run from its last checkpoint, bit for bit. Raises UserError for a run that is finished or none."""
    log = RunLog.open(run)
    with log.lock():
        if (log.path / "summary.json").is_file():
            raise UserError(f"--resume {run}: this run is finished; its figures are in summary.json")
        if (log.path / "stage.json").is_file():
            raise UserError(f"--resume {run}: is a stage of post-training; begin it again with --overwrite True")
        trainer = Trainer(dataclasses.replace(log.config(), run=str(log.path)))
        trainer.restore(log)
        return trainer.run(log, observer or Silent())


class Trainer:
    """Everything that changes while a run goes on."""

    def __init__(self, config: Config):
        self.config = config
        check_tracker(config)
        corpus.check(config.corpus)
        if config.evaluate.path:
            corpus.check(dataclasses.replace(config.corpus, path=config.evaluate.path), "evaluate.path")
        self.tokenizer = load_tokenizer(config.model)
        self.form = thought_format(self.tokenizer, config.method)
        check_length(config, self.form)
        next(corpus.Windows(config.corpus, self.tokenizer, config.seed))  # a corpus of short texts fails now
        self.held_out = text.held_out(config, self.tokenizer) if config.evaluate.path else []
        self.policy = load_model(config.model, config.seed)
        self.network = Network(self.policy, config.model.precision)
        self.engine = engine(self.network.compute, self.form, config)
        build = METHODS[config.method.name]
        self.method: Method = build(self.network, self.engine, self.form, self.tokenizer, config)
        options = config.optim
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=self.policy.device.type == "cuda" or None,  # in place, without a copy of all weights
        )
        self.stream = corpus.Windows(config.corpus, self.tokenizer, config.seed)
        self.watch = Watch(config.method.inner_steps)
        self.step, self.saved = 0, -1
        self.shape, self.cost = Shape.known(self.policy.config), Flops()
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

    def run(self, log: RunLog, observer: Observer) -> dict[str, Any]:
        """Evaluate, train, evaluate; leave a finished run folder."""
        gate, train = Gate(), self.config.train
        with Tracker(self.config, log.path) as tracker, gate.installed():
            try:
                before = self._evaluate(log, observer, gate, "before")
                while not self.over:
                    self._step(log, observer, gate, tracker)
                    if self.step % train.checkpoint_every == 0 or self.over:
                        self._save(log)
                after = self._evaluate(log, observer, gate, "after")
            except (SignalArrived, UserError, RunError) as error:
                if self.whole:
                    self._save(log)
                if isinstance(error, SignalArrived):
                    again = f"forethought train --resume {log.path}"
                    raise Stopped(error.number, f"saved after step {self.step}; go on with: {again}") from None
                raise
            self._export(log)
        summary = self._summary(before, after)
        self._warn(log, observer, of_evaluation(summary, self.step))
        log.write_json("summary.json", summary)
        return summary

    def _step(self, log: RunLog, observer: Observer, gate: Gate, tracker: Tracker) -> None:
        """One batch of text: collect, then `inner_steps` times backward, clip, step, and what follows a step."""
        started, cursor, number = time.perf_counter(), self.stream.cursor(), self.step + 1
        self._set_rate(number)
        try:
            with gate.passing():
                windows = [next(self.stream) for _ in range(self._windows_per_step())]
                batch = self.method.collect(windows, number)
                metrics = self._backward(batch, windows, number)
        except BaseException:
            self.stream.seek(cursor)
            raise
        self.whole = False
        metrics |= self._update()
        first = {name: metrics[name] for name in ("objective/mismatch",) if name in metrics}  # before any update
        for _ in range(1, self.config.method.inner_steps):
            metrics = self._backward(batch, windows, number) | self._update() | first
        self.step = number
        metrics |= _means(batch.sums) | self._rates(batch, time.perf_counter() - started) | self._costs(batch)
        if self.config.train.logs(number) or self.over:
            log.metrics(number, metrics)
            log.thoughts(batch.thoughts)
            self._warn(log, observer, self.watch.see(number, metrics))
            tracker.log(number, metrics)
        self.whole = True
        done = max(self.spent, number / self.config.train.steps)
        observer.step(number, max(number, round(number / done)), metrics)

    def _warn(self, log: RunLog, observer: Observer, found: list[Diagnosis]) -> None:
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

    def _backward(self, batch: Collected, windows: list[corpus.Window], number: int) -> dict[str, float]:
        """Gradients of one pass over the batch. A loss or gradient that is no number stops the run (RunError)."""
        self.optimizer.zero_grad(set_to_none=True)
        total, sums = 0.0, Sums()
        for piece in batch.pieces:
            value, more = self.method.backward(piece)
            total += value
            add(sums, more)
        limit = self.config.optim.gradient_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit))
        if not (math.isfinite(total) and math.isfinite(norm)):
            names = ", ".join(dict.fromkeys(window.document for window in windows[:3]))
            good = self.step if self.whole else self.saved
            raise RunError(
                f"step {number}: the loss is {total} and the gradient norm {norm}; its batch began with documents "
                f"{names}; " + (f"the last good state is that of step {good}" if good >= 0 else "no state was saved")
            )
        return {"objective/loss": total, "optim/gradient_norm": norm} | _means(sums)

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

    def _rates(self, batch: Collected, seconds: float) -> dict[str, float]:
        collect = sum(batch.sums.get(f"time/{phase}_s", (0.0, 1))[0] for phase in ("rollout", "score"))
        figures = {"time/step_s": seconds, "time/update_s": seconds - collect}
        if "rollout/tokens" in batch.sums:
            figures["time/thought_tokens_per_s"] = batch.sums["rollout/tokens"][0] / seconds
            figures["time/positions_per_s"] = self.config.train.batch / seconds
        else:
            figures["time/windows_per_s"] = self.config.train.batch / seconds
        return figures | {
            "corpus/documents": self.stream.documents,
            "corpus/skipped": self.stream.skipped,
            "corpus/tokens": self.stream.tokens,
            "corpus/epoch": self.stream.epoch,
        }

    def _costs(self, batch: Collected) -> dict[str, float]:
        if self.shape is None:
            return {}
        cost = step_flops(self.shape, batch.work)
        self.cost += cost
        return {"cost/flops": float(cost.total), "cost/flops_total": float(self.cost.total)}

    def _evaluate(self, log: RunLog, observer: Observer, gate: Gate, when: str) -> dict[str, text.Records] | None:
        """Held-out records; those of before training are kept in the run folder, so a resumed run has them too."""
        if not self.config.evaluate.path:
            return None
        name = f"evaluation-{when}.json"
        if (log.path / name).is_file():
            return {group: text.Records(**fields) for group, fields in log.read_json(name).items()}
        subject = text.Subject(
            model=self.network.compute,
            engine=self.engine,
            form=self.form,
            tokenizer=self.tokenizer,
            config=self.config,
            teacher=self.method.state().get("teacher"),
        )
        with gate.passing():
            records = text.measure(
                subject, self.held_out, lambda done, total: observer.phase(f"evaluating {when} training", done, total)
            )
        log.write_json(name, {group: dataclasses.asdict(fields) for group, fields in records.items()})
        return records

    def _save(self, log: RunLog) -> None:
        """A checkpoint of this moment, unless there is one."""
        if self.saved == self.step:
            return
        tensors = {
            f"{network}/{name}": tensor
            for network, module in {"policy": self.policy, **self.method.state()}.items()
            for name, tensor in _own_tensors(module).items()
        }
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in values.items()}
        state = {"step": self.step, "seconds": self.seconds, "cursor": self.stream.cursor()}
        state["cost"] = dataclasses.asdict(self.cost)
        snapshot = checkpoint.Snapshot(tensors=tensors, state=state)
        checkpoint.save(log.path, self.step, snapshot, self.config.train.keep_checkpoints)
        self.saved = self.step

    def restore(self, log: RunLog) -> None:
        """Take up the run's newest checkpoint (or its start, where it has none) and drop what was logged after it."""
        path = checkpoint.latest(log.path)
        if path is None:
            log.rewind(0)
            return
        snapshot = checkpoint.load(path)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in snapshot.tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        for network, module in {"policy": self.policy, **self.method.state()}.items():
            module.load_state_dict(parts[network], strict=False)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in parts.get("optimizer", {}).items():
            index, _, rest = name.partition("/")
            state.setdefault(int(index), {})[rest] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step = self.saved = snapshot.state["step"]
        self._seconds = snapshot.state["seconds"]
        self.cost = Flops(**snapshot.state["cost"])
        self.stream.seek(snapshot.state["cursor"])
        self.network.sync()
        self.engine.sync()
        log.rewind(self.step)
        self.watch.replay(read_lines(log.path / "metrics.jsonl"))

    def _export(self, log: RunLog) -> None:
        """The trained model as a Hugging Face folder, RUN/policy."""
        partial, final = log.path / ".policy-partial", log.path / "policy"
        shutil.rmtree(partial, ignore_errors=True)
        with disk_errors(log.path, partial), checkpoint.tensor_errors(partial):
            self.policy.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            for file in partial.glob("*.safetensors"):
                shutil.copymode(partial / "config.json", file)  # safetensors lets nobody but the owner read its files
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

    def _summary(self, before: Any, after: Any) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "method": self.config.method.name,
            "seed": self.config.seed,
            "steps": self.step,
            "seconds": round(self.seconds, 2),
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
                figures |= {f"{when}/{name}": value for name, value in text.summarise(records, before).items()}
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


def _own_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without second names of tied tensors."""
    seen: dict[int, str] = {}
    return {
        name: tensor for name, tensor in module.state_dict().items() if seen.setdefault(tensor.data_ptr(), name) == name
    }


def _means(sums: Sums) -> dict[str, float]:
    return {name: value / count for name, (value, count) in sums.items() if count}
