"""Ask a model or a run questions: `forethought questions`."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forethought.config import Config
from forethought.data.positions import thought_format
from forethought.eval import started, trained
from forethought.models.compute_copy import compute_copy
from forethought.models.loading import load_model, load_tokenizer
from forethought.run.folder import RunLog, check_free
from forethought.tools.questions import answers, questions
from forethought.tools.questions.tasks import TASKS, Benchmark, exams


def ask(
    target: str | Path, overrides: dict[str, Any] | None = None, progress: questions.Progress | None = None
) -> tuple[dict[str, Any], Path]:
    """Accuracies on questions of a run (its trained model beside its start) or of a model alone.

    `overrides` is a nested dict of options. Figures go to questions.json and every prompt, answer and verdict to
    questions.jsonl: into the run, or for a model into a new folder, `run`. Returns the figures (flat keys,
    docs/metrics.md) and their file. Raises UserError.
    """
    began = time.perf_counter()
    log, config = started(target, overrides or {}, "questions")
    asked = exams(config.questions)
    if log is None:
        check_free(Path(config.run), config.overwrite)
        measure = prepared(config, asked, progress)
        log = RunLog.create(config)
        records = {"model": measure()}
    else:
        mine = trained(config, log.path)
        records = {"model": prepared(mine, asked, progress)(), "base": prepared(config, asked, progress)()}
    figures: dict[str, Any] = {"seed": config.seed, "checker": answers.checker()}
    figures |= {f"version/{exam.task.name}": exam.task.version for exam in asked}
    for who, some in records.items():
        figures |= {f"{who}/{name}": value for name, value in questions.summarize(some).items()}
    if "base" in records:
        difference = questions.over_base(records["model"], records["base"])
        figures |= {f"over_base/{name}": value for name, value in difference.items()}
    figures["seconds"] = round(time.perf_counter() - began, 2)
    log.write_lines("questions.jsonl", [row(who, one) for who, some in records.items() for one in some])
    log.write_json("questions.json", figures)
    return figures, log.path / "questions.json"


def prepared(
    config: Config, asked: Sequence[Benchmark], progress: questions.Progress | None
) -> Callable[[], list[questions.Record]]:
    """Load all that asking takes, so that what is wrong with it is known before a folder is made."""
    tokenizer = load_tokenizer(config.model)
    form = thought_format(tokenizer, config.method)
    model = compute_copy(load_model(config.model, config.seed), config.model.precision)
    questions.check_room(model, form, tokenizer, asked, config)

    def measure() -> list[questions.Record]:
        return questions.measure(model, form, tokenizer, asked, config, progress or (lambda done, total: None))

    return measure


def row(who: str, record: questions.Record) -> dict[str, Any]:
    """A line of questions.jsonl."""
    return {
        "model": who,
        "mode": record.mode,
        "task": record.task,
        "version": TASKS[record.task].version,
        "id": record.question.id,
        "subject": record.question.subject,
        "prompt": record.prompt,
        "reference": record.question.answer,
        "picks": record.picks,
        "answers": [dataclasses.asdict(answer) for answer in record.answers],
    }
