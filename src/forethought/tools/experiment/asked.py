"""Benchmark questions in an experiment: every arm is asked the same, with the same random numbers, once.

FOLDER/answers.json      what it was asked with, and each metric as one number a question
FOLDER/questions.jsonl   every prompt, answer and verdict (docs/questions.md)
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forethought.config import Config
from forethought.run.folder import RunLog
from forethought.run.trackers import Callbacks
from forethought.tools.experiment.design import Experiment
from forethought.tools.questions import answers, questions
from forethought.tools.questions import ask as asking
from forethought.tools.questions.tasks import exams

ANSWERS = "answers.json"
NORMAL = 1.96  # standard errors in half a 95 % interval

Answered = Mapping[tuple[str, str], Mapping[str, np.ndarray]]
"""(mode, task) -> metric -> one number a question, the mean over its answers."""


def check(experiment: Experiment) -> None:
    """Fail before anything is trained where the questions cannot be read. Raises UserError."""
    if experiment.ask:
        exams(experiment.start.questions)


def done(experiment: Experiment, folder: Path) -> bool:
    """Whether the model of this folder was asked with the experiment's options; no questions are always answered."""
    if not experiment.ask:
        return True
    return (folder / ANSWERS).is_file() and RunLog(folder).read_json(ANSWERS)["asked"] == _asked(experiment)


def ask(experiment: Experiment, config: Config, folder: Path, observer: Callbacks) -> None:
    """Ask `config.model`, unless that is done. Raises UserError."""
    if done(experiment, folder):
        return
    start = experiment.start
    config = dataclasses.replace(config, seed=start.seed, questions=start.questions)
    measure = asking.prepared(config, exams(start.questions), lambda done, total: observer.phase("asking", done, total))
    records = measure()
    columns = {"/".join(key): _plain(some) for key, some in questions.columns(records).items()}
    log = RunLog(folder)
    log.write_lines("questions.jsonl", [asking.row(folder.name, one) for one in records])
    log.write_json(ANSWERS, {"asked": _asked(experiment), "columns": columns})


def answered(folder: Path) -> Answered:
    """What `ask` found."""
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, metrics in RunLog(folder).read_json(ANSWERS)["columns"].items():
        mode, task = key.split("/")
        found[mode, task] = {metric: np.array(values) for metric, values in metrics.items()}
    return found


def pooled(seeds: Sequence[Answered]) -> questions.Figures:
    """Flat figures MODE/GROUP/METRIC, each with /se: means over seeds.

    The error is over questions (each one's mean over seeds) and over seeds, as if the two were independent:
    se^2 = se_questions^2 + variance between seeds / seeds. One seed has the former only.
    """
    keys = seeds[0].items()
    mean = {key: {name: np.mean([one[key][name] for one in seeds], axis=0) for name in some} for key, some in keys}
    figures = questions.figures(mean)
    if len(seeds) == 1:
        return figures
    each = [questions.figures(one) for one in seeds]
    for name in [name for name in figures if f"{name}/se" in figures]:
        between = float(np.var([one[name] for one in each], ddof=1)) / len(each)
        figures[f"{name}/se"] = math.sqrt(figures[f"{name}/se"] ** 2 + between)
    return figures


def over(seeds: Sequence[Answered], base: Answered) -> questions.Figures:
    """The same of the differences to the base, question by question: accuracies only."""
    return pooled([questions.difference(one, base) for one in seeds])


def with_intervals(figures: questions.Figures) -> questions.Figures:
    """Each figure that has an error with the 95 % interval that it means, as /low and /high."""
    ends: questions.Figures = {}
    for name in [name for name in figures if f"{name}/se" in figures]:
        reach = NORMAL * figures[f"{name}/se"]
        ends |= {f"{name}/low": figures[name] - reach, f"{name}/high": figures[name] + reach}
    return {**figures, **ends}


def _asked(experiment: Experiment) -> dict[str, Any]:
    """What answers depend on besides the model, as JSON keeps it."""
    options = dataclasses.asdict(experiment.start.questions)
    return json.loads(json.dumps({**options, "seed": experiment.start.seed, "checker": answers.checker()}))


def _plain(metrics: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {metric: values.tolist() for metric, values in metrics.items()}
