"""One job of an experiment: train an arm with one seed, or resume it, then measure it. Finished parts are kept.

RUN/base/records.json              measurements of the start; beside them generic.json, its generic thought
RUN/ARM/seed-N/                    the arm's run folder, its records.json and generic.json
RUN/ARM/seed-N/documents.json      for the thought viewer, with the first seed
RUN/ARM/seed-N/answers.json        results of the experiment's questions (questions.py); also base/answers.json
RUN/ARM/seed-N/spent.json          seconds and CPU seconds of the job
RUN/ARM/seed-N/post/               post-training: a run folder for each stage, records.json in that of the last
RUN/base/seed-N/post/              the same for the start
"""

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

from forethought import eval
from forethought.config import Config, UserError, difference
from forethought.eval import controls, heldout, viewer
from forethought.models.loading import load_tokenizer
from forethought.run.folder import RunLog
from forethought.run.trackers import Callbacks
from forethought.tools import resume, train
from forethought.tools.experiment import questions
from forethought.tools.experiment.design import BASE, Experiment, Job
from forethought.tools.posttrain import chain, last_stage

RECORDS, GENERIC, SPENT, POST = "records.json", "generic.json", "spent.json", "post"
Recorded = dict[str, heldout.Records]
"""Held-out records by group of positions."""


class Meter:
    """Seconds and CPU seconds that this process spends on each job."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, folder: Path) -> None:
        """Add the time since the last lap to a job's spent.json."""
        wall, cpu = time.perf_counter(), time.process_time()
        log = RunLog(folder)
        before = log.read_json(SPENT, {"seconds": 0.0, "cpu_seconds": 0.0})
        spent = {"seconds": wall - self._wall, "cpu_seconds": cpu - self._cpu}
        self._wall, self._cpu = wall, cpu
        log.write_json(SPENT, {name: round(before[name] + value, 2) for name, value in spent.items()})


def measure_base(experiment: Experiment, observer: Callbacks, meter: Meter) -> None:
    """Measure the start, and post-train it with every seed if arms are, unless that is done."""
    folder = experiment.run / BASE
    known, seeds = (folder / RECORDS).is_file(), sorted({job.seed for job in experiment.jobs})
    if known:
        _check_same(RunLog.open(folder).config(), experiment.start, BASE)
        posttrained = [_posttrained(experiment, folder / f"seed-{seed}") for seed in seeds]
        if questions.done(experiment, folder) and all(posttrained):
            return
    observer.part(BASE)
    if not known:
        start = dataclasses.replace(experiment.start, overwrite=True)
        subject = eval.subject_of(start)
        _measure(experiment.start, RunLog.create(start), subject, observer)
    questions.ask(experiment, experiment.start, folder, observer)
    for seed in seeds:
        _posttrain(experiment, dataclasses.replace(experiment.start, seed=seed), folder / f"seed-{seed}", observer)
    meter.lap(folder)


def check_text(experiment: Experiment) -> None:
    """Raise UserError where the start was measured on other held-out text than the arms would be."""
    start, file = experiment.start, experiment.run / BASE / RECORDS
    if file.is_file():
        windows = heldout.held_out(start, load_tokenizer(start.model))
        heldout.check_text(records(file.parent), windows, start.evaluate.path, file)


def finished(experiment: Experiment, job: Job) -> bool:
    """Whether a job is done. Raises UserError if its folder holds a run with other options."""
    folder = Path(job.config.run)
    if not (folder / "config.json").is_file():
        return False
    known = job.needs is None or (experiment.run / job.needs / "summary.json").is_file()
    if known:
        _check_same(RunLog.open(folder).config(), _with_budget(experiment, job), job.name)
    measured = (folder / RECORDS).is_file() and _posttrained(experiment, folder)
    return known and measured and questions.done(experiment, folder)


def run_job(experiment: Experiment, job: Job, observer: Callbacks, meter: Meter) -> None:
    """Train, measure, post-train and measure again, except for what is done.

    Raises:
        UserError: the folder holds a run with other options; the job whose budget it follows is not finished.
        RunError, Stopped: as in training; the same call resumes.
    """
    config = _with_budget(experiment, job)
    folder, begun = Path(config.run), (Path(config.run) / "config.json").is_file()
    if begun:
        _check_same(RunLog.open(folder).config(), config, job.name)
    try:
        if not begun:
            train(config, observer)
        elif not (folder / "summary.json").is_file():
            resume(folder, observer, config)
        _measure_job(experiment, job, config, observer)
    finally:
        if (folder / "config.json").is_file():
            meter.lap(folder)


def _measure_job(experiment: Experiment, job: Job, config: Config, observer: Callbacks) -> None:
    """Measure and post-train a trained arm, except for what is done."""
    folder, shared = Path(config.run), experiment.start
    method = dataclasses.replace(config.method, horizon=shared.method.horizon)  # the same positions for all
    config = dataclasses.replace(config, evaluate=shared.evaluate, method=method)
    if not (folder / RECORDS).is_file():
        subject = eval.trained_subject(config, folder)
        first = job.seed == experiment.of(job.arm)[0].seed
        _measure(experiment.start, RunLog.open(folder), subject, observer, viewed=job.name if first else "")
    trained = eval.trained(config, folder)
    questions.ask(experiment, trained, folder, observer)
    _posttrain(experiment, trained, folder, observer)


def records(folder: Path) -> Recorded:
    """The records of an arm's run, or of the base. Raises UserError where there is none."""
    found = RunLog.open(folder).read_json(RECORDS)
    return {name: heldout.Records(**fields) for name, fields in found.items()}


def post_records(experiment: Experiment, folder: Path) -> Recorded:
    """The records after post-training, as groups `post:NAME`; empty where there is none."""
    found = records(last_stage(experiment.post, folder / POST)) if experiment.post else {}
    return {f"post:{name}": one for name, one in found.items()}


def weights(folder: Path) -> str:
    """A digest of a trained model's weight files. Raises UserError where there are none."""
    digest, files = hashlib.sha256(), sorted((folder / "policy").glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder / 'policy'}: holds no weights")
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _measure(start: Config, log: RunLog, subject: heldout.Subject, observer: Callbacks, viewed: str = "") -> None:
    windows = heldout.held_out(start, subject.tokenizer)  # an arm may read its own corpus otherwise
    generic = controls.generic_thought(subject, windows, observer.phase)
    found = controls.measure(subject, windows, observer.phase, generic)
    if viewed and subject.config.evaluate.view:
        reference = eval.subject_of(start).model if subject.teacher is None else subject.teacher
        log.write_json("documents.json", viewer.documents(subject, reference, windows, viewed, observer.phase))
    if generic is not None:
        log.write_json(GENERIC, {"text": subject.tokenizer.decode(generic)})
    log.write_json(RECORDS, {name: dataclasses.asdict(fields) for name, fields in found.items()})


def _posttrain(experiment: Experiment, start: Config, folder: Path, observer: Callbacks) -> None:
    """Run all stages of post-training, then measure as before."""
    if not experiment.post:
        return
    last = chain(experiment.post, start, folder / POST, observer)
    if not (last / RECORDS).is_file():
        _measure(experiment.start, RunLog.open(last), eval.trained_subject(start, last), observer)


def _posttrained(experiment: Experiment, folder: Path) -> bool:
    """Whether post-training is done and measured; without stages always. Raises UserError for other stages."""
    return not experiment.post or (last_stage(experiment.post, folder / POST) / RECORDS).is_file()


def _with_budget(experiment: Experiment, job: Job) -> Config:
    """The job's config with the budget of the job that it follows."""
    if job.needs is None:
        return job.config
    finished = experiment.run / job.needs
    if not (finished / "summary.json").is_file():
        raise UserError(f"{job.name} follows the budget of {job.needs}, which is not finished")
    spent = RunLog.open(finished).read_json("summary.json")
    budget: dict[str, Any] = {}
    for kind in experiment.arms[job.arm].budget:
        if kind not in spent:
            raise UserError(f"{job.name}: the {kind} of {job.needs} are not known (docs/flops.md); give train.steps")
        budget[kind] = type(getattr(job.config.train, kind))(spent[kind])
    return dataclasses.replace(job.config, train=dataclasses.replace(job.config.train, **budget))


def _check_same(saved: Config, wanted: Config, name: str) -> None:
    """Raise UserError for a run with other options."""
    if found := difference(saved, wanted):
        option, before, now = found
        raise UserError(
            f"{name} was made with {option} = {before!r}, and the experiment says {now!r}; "
            "choose another run (--run PATH)"
        )
