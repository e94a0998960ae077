"""Benchmark questions in an experiment: every arm gets the same questions, with the same random numbers, once.

FOLDER/answers.json      the options of the questions, and each metric as one number per question
FOLDER/questions.jsonl   every prompt, answer and verdict (docs/questions.md)
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forethought.config import Config, UserError
from forethought.config.registry import METRICS
from forethought.eval.intervals import MIN_CLUSTERS
from forethought.run.folder import RunLog
from forethought.run.trackers import Callbacks
from forethought.tools import benchmarks
from forethought.tools.benchmarks import Columns, Figures
from forethought.tools.experiment.design import BASE, Experiment

ANSWERS = "answers.json"
NORMAL = 1.96  # standard errors in half a 95 % interval


def check(experiment: Experiment) -> None:
    """Fail before anything is trained where questions are left and cannot be read. Raises UserError."""
    if not all(done(experiment, folder) for folder in _folders(experiment)):
        benchmarks.require_extra()
        _same_data(experiment, benchmarks.load_tasks(experiment.start.questions))


def done(experiment: Experiment, folder: Path) -> bool:
    """Whether the model of this folder has answered with the experiment's options; without questions always.

    Answers graded by another checker remain where it graded all of the experiment's.
    """
    if not experiment.ask:
        return True
    if not _same_options(experiment, folder):
        return False
    checkers = {_options_of(one).get("checker") for one in _folders(experiment)}
    return len(checkers) == 1 or _options_of(folder)["checker"] == benchmarks.checker()


def ask(experiment: Experiment, config: Config, folder: Path, observer: Callbacks) -> None:
    """Evaluate `config.model`, unless that is done. Raises UserError."""
    if done(experiment, folder):
        return
    start = experiment.start
    config = dataclasses.replace(config, seed=start.seed, questions=start.questions)
    tasks = benchmarks.load_tasks(start.questions)
    data = _same_data(experiment, tasks)
    rows = benchmarks.prepare(config, tasks, lambda done, total: observer.phase("answering", done, total))(folder.name)
    columns = {
        "/".join(key): {metric: values.tolist() for metric, values in some.items()}
        for key, some in benchmarks.columns(rows).items()
    }
    log = RunLog(folder)
    log.write_lines("questions.jsonl", rows)
    asked = {**_options(experiment), "checker": benchmarks.checker()}
    log.write_json(ANSWERS, {"asked": asked, "data": data, "columns": columns})


def _same_data(experiment: Experiment, tasks: Sequence[benchmarks.Benchmark]) -> dict[str, str]:
    """A digest of each task's questions. Raises UserError where other ones have been answered in this experiment."""
    data = {task.name: task.digest for task in tasks}
    for folder in _folders(experiment):
        known = RunLog(folder).read_json(ANSWERS, {}).get("data", data) if _same_options(experiment, folder) else data
        if other := [name for name in data if known.get(name) != data[name]]:
            what = f"the questions of {other[0]}, or its version, are not those answered in {folder / ANSWERS}"
            raise UserError(f"{what}; put the old ones back, or choose another run (--run PATH)")
    return data


def _folders(experiment: Experiment) -> list[Path]:
    return [experiment.run / name for name in (BASE, *(job.name for job in experiment.jobs))]


def _options_of(folder: Path) -> dict[str, Any]:
    return RunLog(folder).read_json(ANSWERS, {}).get("asked", {})


def _same_options(experiment: Experiment, folder: Path) -> bool:
    return {**_options_of(folder), "checker": ""} == _options(experiment)


def _options(experiment: Experiment) -> dict[str, Any]:
    """What answers depend on besides the model and the checker, as JSON."""
    options = dataclasses.asdict(experiment.start.questions)
    return json.loads(json.dumps({**options, "seed": experiment.start.seed, "checker": ""}))


def answered(folder: Path) -> Columns:
    """The columns of `ask`."""
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, metrics in RunLog(folder).read_json(ANSWERS)["columns"].items():
        mode, task = key.split("/")
        found[mode, task] = {metric: np.array(values) for metric, values in metrics.items()}
    return found


def pooled(seeds: Sequence[Columns]) -> Figures:
    """Flat figures MODE/GROUP/METRIC, each with /se: means over seeds.

    The error is over questions (each one's mean over seeds) and over seeds, as if the two were independent:
    se^2 = se_questions^2 + variance between seeds / seeds. One seed has the former only.
    """
    keys = seeds[0].items()
    mean = {key: {name: np.mean([one[key][name] for one in seeds], axis=0) for name in some} for key, some in keys}
    figures = benchmarks.summarize(mean)
    if len(seeds) == 1:
        return figures
    each = [benchmarks.summarize(one) for one in seeds]
    for name in [name for name in figures if f"{name}/se" in figures]:
        between = float(np.var([one[name] for one in each], ddof=1)) / len(each)
        figures[f"{name}/se"] = math.sqrt(figures[f"{name}/se"] ** 2 + between)
    return figures


def over(seeds: Sequence[Columns], base: Columns) -> Figures:
    """The same of the differences to the base, question by question: accuracies only."""
    return pooled([benchmarks.difference(one, base) for one in seeds])


def with_intervals(figures: Figures, least: float = 0.0) -> Figures:
    """Each figure that has an error with its 95 % interval as /low and /high; those of shares are in `least` to 1.

    Fewer than 10 questions (of an average: in any task) give none. Where all questions are answered alike, such as 0 of
    18, it is Wilson's bound.
    """
    ends: Figures = {}
    fewest = min((count for key, count in figures.items() if key.endswith("/questions")), default=0)
    for name in [name for name in figures if f"{name}/se" in figures]:
        group, _, metric = name.rpartition("/")
        asked, reach = figures.get(f"{group}/questions", fewest), NORMAL * figures[f"{name}/se"]
        if not reach and metric in benchmarks.ACCURACIES:
            reach = NORMAL**2 / (asked + NORMAL**2)
        if asked >= MIN_CLUSTERS:
            low, high = figures[name] - reach, figures[name] + reach
            if METRICS[metric].unit == "share":
                low, high = max(low, least), min(high, 1.0)
            ends |= {f"{name}/low": low, f"{name}/high": high}
    return {**figures, **ends}
