"""Benchmark questions through lm-evaluation-harness, with and without thoughts: `forethought questions`.

The tasks are YAML files for the harness (`tasks/`), the model is the adapter of lm_eval.py, and math-verify checks
written answers. Every model gets the same prompts and random numbers. A standard error is over questions: the answers
to one question are averaged first.
"""
# pyright: reportMissingImports=false

import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import random
import re
import reprlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from forethought.config import Config, Questions, UserError
from forethought.eval import overridden, started, trained
from forethought.inference import ThinkingModel
from forethought.models.compute_copy import compute_copy
from forethought.models.loading import load_model, load_tokenizer
from forethought.run.folder import RunLog, check_free, read_jsonl

MATH = ("gsm8k", "math500", "aime24", "aime25", "amc23", "minerva")  # written answers
SCIENCE = ("mmlu", "mmlu_pro", "gpqa")  # multiple choice
AREAS = {"math": MATH, "science": SCIENCE}
ACCURACIES = ("pass_at_1", "greedy", "loglik_letter", "loglik_plain", "loglik_normalised")
LETTERS = "ABCDEFGHIJ"
_MODES = {"without": ("nothink",), "with": ("think",), "both": ("nothink", "think")}
_EXTENSIONS = (".jsonl", ".jsonl.gz", ".csv")
_TIMEOUT_S = 5  # of math-verify, for one answer
_SMALL, _ROUNDING = 1e-3, 1e-6  # below the first, references and answers differ by at most the second, relatively
_FIELDS = {  # names of the hub's data sets and of their common copies
    "question": ("question", "problem", "Question"),
    "answer": ("answer", "final_answer", "expected_answer"),
    "choices": ("choices", "options"),
    "id": ("id", "unique_id", "question_id", "Record ID"),
    "subject": ("subject", "category", "Subdomain"),
}
_MINUS = re.compile(r"[−﹣－]|(?<![\w)}])[‐‑‒–](?=[\d.$\\])")
_BOX = re.compile(  # with a group where it continues a list of boxes
    r"(\}\$*\s*(?:[,;]|(?:[,;]\s*|\\text\{\s*)?\b(?:and|or)\b)[\s}]*)?"
    r"\${0,2}(?:\b\w{1,9} ?= ?)?\\(?:boxed|fbox)\b(?=[^}]*\})"
)
_GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

Progress = Callable[[int, int], None]
Row = dict[str, Any]  # a line of questions.jsonl: one question to one model in one mode (docs/questions.md)
Columns = Mapping[tuple[str, str], Mapping[str, np.ndarray]]  # (mode, task) -> metric -> one number per question
Figures = dict[str, float | int]


def run_benchmarks(
    target: str | Path, overrides: dict[str, Any] | None = None, progress: Progress | None = None
) -> tuple[dict[str, Any], Path]:
    """Accuracies on benchmark questions of a run (its trained model beside its start) or of a single model.

    `overrides` is a nested dict of options. Figures go to questions.json and every prompt, answer and verdict to
    questions.jsonl: into the run, or for a model into a new folder, `run`. Returns the figures (flat keys,
    docs/metrics.md) and their file. Raises UserError.
    """
    began = time.perf_counter()
    log, config = started(target, overrides or {}, "questions")
    require_extra()
    tasks = load_tasks(config.questions)
    if log is None:
        check_free(Path(config.run), config.overwrite)
        measure = prepare(config, tasks, progress)
        log = RunLog.create(config)
        rows = {"model": measure("model")}
    else:
        log.check_writable()
        subjects = {"model": trained(config, log.path), "base": config}
        rows = {who: prepare(subject, tasks, progress)(who) for who, subject in subjects.items()}
    tables = {who: columns(some) for who, some in rows.items()}
    if "base" in tables:
        tables["over_base"] = difference(tables["model"], tables["base"])
    figures: dict[str, Any] = {"seed": config.seed, **overridden(log, config), "checker": checker()}
    figures |= {f"version/{task.name}": task.version for task in tasks}
    for who, table in tables.items():
        figures |= {f"{who}/{name}": value for name, value in summarize(table).items()}
    figures["seconds"] = round(time.perf_counter() - began, 2)
    log.write_lines("questions.jsonl", [row for some in rows.values() for row in some])
    log.write_json("questions.json", figures)
    return figures, log.path / "questions.json"


def require_extra() -> None:
    """Raises UserError where lm-evaluation-harness or math-verify is not installed; else turns off their warnings."""
    for package in ("lm_eval", "math_verify"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"benchmark questions need {package}: pip install 'forethought[eval]'")
        logging.getLogger(package).setLevel(logging.ERROR)


def checker() -> str:
    """The package and version that checks written answers."""
    return f"math-verify {importlib.metadata.version('math-verify')}"


# Tasks and data


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """The harness's tasks of a benchmark: with written answers, and for multiple choice also by likelihood."""

    name: str
    written: Any
    letters: Any = None
    cloze: Any = None

    @property
    def version(self) -> str:
        """Changes with everything that changes a figure: prompts, extraction, grading."""
        return str(self.written.VERSION)

    @property
    def digest(self) -> str:
        """Changes with the questions and their answers too."""
        asked = json.dumps([self.version, *map(dict, self.written.eval_docs)], default=str)
        return hashlib.sha256(asked.encode()).hexdigest()


def load_tasks(options: Questions) -> list[Benchmark]:
    """The tasks of questions.tasks, with data from NAME=PATH, else questions.data, else the hub. Raises UserError."""
    from lm_eval.tasks import TaskManager

    from forethought.tools.lm_eval import TASKS

    paths = {name: path or options.data for name, _, path in (entry.partition("=") for entry in options.tasks)}
    if len(paths) < len(options.tasks):
        raise UserError(f"questions.tasks = {','.join(options.tasks)!r}: names a task twice")
    about = {"data": paths, "limit": options.limit}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=about)

    def load(name: str) -> Any:
        [task] = manager.load(f"forethought_{name}")["tasks"].values()
        task.set_config("num_fewshot", options.shots)
        return task

    more = {name: ("letters", "cloze") if name in SCIENCE else () for name in paths}
    return [
        Benchmark(name=name, written=load(name), **{kind: load(f"{name}_{kind}") for kind in more[name]})
        for name in paths
    ]


def load_dataset(
    *, name: str, files: Sequence[str], hub: Sequence[str], dev: str = "", tolerance: float = 0.0, **options: Any
) -> dict[str, Any]:
    """The data of a task file, as its `custom_dataset`: the rows of `test`, and worked examples by subject as `dev`.

    Rows have id, question, answer, choices, subject and tolerance, the relative error that a number may have. The
    metadata `data` is a file, a folder with a file NAME or one of `files`, a dict of these by task, or empty for the
    hub. `limit` takes that many rows, evenly spaced (files are often sorted by subject). Raises UserError.
    """
    import datasets

    data, limit = options.get("data", ""), options.get("limit", 0)
    path = data.get(name, "") if isinstance(data, dict) else data
    file = _locate(name, path, (name, *files)) if path else None
    rows = [one | {"tolerance": tolerance} for one in _questions(name, file, hub)]
    if not rows:
        raise UserError(f"questions.tasks = {name!r}: {path or 'the hub'} holds no question")
    count = min(limit or len(rows), len(rows))
    worked = _first(file.parent, (dev,)) if file and dev else None
    examples: dict[str, list[Row]] = {}
    for one in _questions(name, worked, (*hub[:2], "dev")) if worked or (dev and not file) else ():
        examples.setdefault(one["subject"], []).append(one)
    return {"test": datasets.Dataset.from_list([rows[i * len(rows) // count] for i in range(count)]), "dev": examples}


def _locate(task: str, path: str, names: Sequence[str]) -> Path:
    """The file itself, or the task's file in that folder."""
    place, known = Path(os.path.expanduser(path)), ", ".join(_EXTENSIONS)  # noqa: PTH111
    file = _first(place, names) if place.is_dir() else place
    if file is None:
        hint = f"leave the task out or name its file: {task}=FILE"
        raise UserError(f"questions.tasks = {task!r}: no file {' or '.join(names)} ({known}) in {path}; {hint}")
    if not file.is_file():
        raise UserError(f"questions.data or questions.tasks, for {task!r}: {path}: no such file or folder")
    if not file.name.endswith(_EXTENSIONS):
        raise UserError(f"questions.tasks = {task!r}: {path}: must be one of {known}")
    return file


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    candidates = (folder / f"{name}{extension}" for name in names for extension in _EXTENSIONS)
    return next((file for file in candidates if file.is_file()), None)


def _questions(task: str, file: Path | None, hub: Sequence[str]) -> list[Row]:
    """The rows of a file, or of a data set on the hub (its id, configuration and split)."""
    try:
        if file is None:
            import datasets

            rows: Any = enumerate(datasets.load_dataset(hub[0], hub[1], split=hub[2]), start=1)
        elif file.suffix == ".csv":
            lines = file.read_text(encoding="utf-8-sig").splitlines(keepends=True)
            rows = enumerate(csv.DictReader(lines, strict=True), start=2)
        else:
            rows = read_jsonl(file)
        return [_question(task, row, f"{file or hub[0]}:{number}") for number, row in rows]
    except UserError:
        raise
    except Exception as error:  # the hub's client raises errors of any type
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        hint = "" if file else "; name a folder of files: questions.data"
        raise UserError(f"questions.tasks = {task!r}: {file or hub[0]} cannot be read ({reason}){hint}") from None


def _question(task: str, row: Mapping[str, Any], where: str) -> Row:
    """A row of a data set with the fields that task files use. Raises UserError, with `where`."""
    found = {field: [row[name] for name in names if row.get(name) is not None] for field, names in _FIELDS.items()}
    question, answer, choices, name, subject = ([*some, ""][0] for some in found.values())
    if "Correct Answer" in row:
        answer, choices = _shuffle([row.get(field) for field in _GPQA], f"choices {question}")
    if bool(choices) != (task in SCIENCE):
        raise UserError(f"{where}: {task} takes questions {'without' if choices else 'with'} choices")
    if choices:
        answer = _letter(answer, row.get("answer_index"), choices, where)
        choices = [str(choice).strip() for choice in choices]
    question, answer = str(question).strip(), str(answer).split("####")[-1].strip()
    if not question or not answer:
        wanted = " and ".join("/".join(_FIELDS[field]) for field in ("question", "answer"))
        raise UserError(f"{where}: a row must have text in {wanted}, got {reprlib.repr(dict(row))}")
    about = {"id": where if name == "" else str(name), "subject": str(subject)}
    return {**about, "question": question, "answer": answer, "choices": choices or []}


def _shuffle(choices: list[Any], seed: str) -> tuple[str, list[Any]]:
    """Choices of which the first is right in an order that depends on the question's text alone; the right letter."""
    order = list(range(len(choices)))
    random.Random(seed).shuffle(order)
    return LETTERS[order.index(0)], [choices[i] for i in order]


def _letter(answer: Any, index: Any, choices: Any, where: str) -> str:
    """The right choice, given as a letter, an index from 0, or both."""
    texts = isinstance(choices, list) and all(isinstance(choice, str | int | float) for choice in choices)
    if not texts or not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{where}: choices must be a list of 2 to {len(LETTERS)} texts, got {reprlib.repr(choices)}")
    letters = list(LETTERS[: len(choices)])
    given = [letters[one] if one in range(len(letters)) else one for one in (answer, index) if one not in ("", None)]
    if not given or given[0] not in letters or given[0] != given[-1]:
        wanted = f"a letter of {''.join(letters)} or its index"
        raise UserError(f"{where}: answer must be {wanted}, got {' and '.join(map(repr, given)) or 'none'}")
    return given[0]


# Checking answers


class Grade(NamedTuple):
    """The final answer in a text, None where there is none, and whether it is right."""

    extracted: str | None
    right: bool


@functools.lru_cache(maxsize=2**16)
def grade(text: str, reference: str, choices: int = 0, tolerance: float = 0.0) -> Grade:
    """Check a written answer with math-verify; for multiple choice, and a reference of one letter, compare letters.

    `tolerance` is the relative error that a number may have. Nothing that a model wrote is run as code.
    """
    if choices or re.fullmatch(f"[{LETTERS}]", reference):
        letter = extract_letter(text, choices or len(LETTERS))
        return Grade(letter, letter == reference)
    import math_verify

    # The library interrupts itself by a signal, which only the main thread can receive.
    timeout = _TIMEOUT_S if threading.current_thread() is threading.main_thread() else 0
    plain = (_plain(one) for one in (f"$\\boxed{{{reference}}}$", text))
    gold, answer = (math_verify.parse(one, parsing_timeout=timeout) for one in plain)
    if not answer:
        return Grade(None, False)
    right = math_verify.verify(gold, answer, timeout_seconds=timeout)
    close = _relative_error(gold, answer, timeout)
    if close is not None:  # the library compares six decimals, too few for small numbers
        right = 0 < close <= tolerance or (right and (abs(float(gold[0])) >= _SMALL or close <= _ROUNDING))
    return Grade(str(answer[-1]), right)


def _plain(text: str) -> str:
    """What math-verify reads anywhere: 0.0045 for 4.5e-3, 5 for 5., hyphen for minus, "= 5" for "=5", no ", and".

    A text with several boxes begins at the last one, or at the first of those that are joined by commas, and, or.
    """
    alone = [found.start() for found in _BOX.finditer(text) if not found[1]]
    text = _MINUS.sub("-", text[alone[-1] :] if len(alone) > 1 else text)
    text = re.sub(r"=(?=-?\d)", "= ", re.sub(r"(?<=\$),\s+(?=(?:and|or)\b)", " ", text))
    text = re.sub(r"(?<=\d)\.(?=\s*[}/])", "", text)
    return re.sub(r"(?<![\w.])\d+(?:\.\d*)?[eE][-+]?\d{1,2}(?![\w])", lambda found: f"{Decimal(found[0]):f}", text)


def _relative_error(gold: Sequence[Any], answer: Sequence[Any], timeout: int) -> float | None:
    """Of the answer, where both are numbers (found in time) and the reference is not 0."""
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout as interrupt

    try:
        true, mine = interrupt(timeout)(lambda: (float(gold[0]), float(answer[0])))()
    except (IndexError, TypeError, ValueError, ArithmeticError, TimeoutException):
        return None
    return abs(mine - true) / abs(true) if true else None


def extract_letter(text: str, choices: int) -> str | None:
    """The letter that a text settles on: boxed, stated as the answer, at its beginning, or the last one on its own."""
    letter = f"([{LETTERS[:choices]}])"
    for pattern in (
        rf"\\boxed\{{\s*(?:\\text\{{)?\(?{letter}(?!\w)",
        rf"(?i:answer|option|choice)(?i:\s+is)?[\s:=*$(]*(?:\\text\{{)?{letter}(?![\w'])",
        rf"\A\s*\(?{letter}(?=[).:,\n]|\s*\Z)",
        rf"(?<![\w'-]){letter}(?=[).,:;]|\s*\Z)",
    ):
        if found := re.findall(pattern, text):
            return found[-1]
    return None


def process_results(doc: Row, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """The metrics of a question, means over its answers: the `process_results` of the task files."""
    extracted, right = zip(*(_grade(doc, text) for text in results[0]), strict=True)
    return {"exact_match": float(np.mean(right)), "extracted": float(np.mean([one is not None for one in extracted]))}


def all_samples(responses: Any, docs: Any) -> Any:
    """The filter of the task files: every sampled answer counts."""
    return responses


def _grade(doc: Row, text: str) -> Grade:
    return grade(str(text), doc["answer"], len(doc["choices"]), doc["tolerance"])


# Evaluating a model


def prepare(config: Config, tasks: Sequence[Benchmark], progress: Progress | None) -> Callable[[str], list[Row]]:
    """Load the model and check that every prompt fits; the function evaluates it, given the model's name in the rows.

    Raises UserError.
    """
    from forethought.tools.lm_eval import ForethoughtLM

    options = config.questions
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, rollout_batch=options.batch))
    model = compute_copy(load_model(config.model, config.seed), config.model.precision)
    thinker = ThinkingModel(model, load_tokenizer(config.model), config)
    lm = ForethoughtLM(
        thinker, thinking=options.thinking != "without", seed=config.seed, max_gen_toks=options.max_tokens
    )
    for task in tasks:
        prompts = [task.written.fewshot_context(doc, options.shots) for doc in task.written.eval_docs]
        longest = max(len(lm.tok_encode(prompt)) for prompt in prompts)
        if longest + options.max_tokens > lm.max_length:
            raise UserError(
                f"questions.shots = {options.shots}: a prompt of {task.name} has {longest} tokens; with "
                f"{options.max_tokens} for an answer that is more than the {lm.max_length} that the model has beside a "
                "thought; lower questions.shots, questions.max_tokens or method.thought_length"
            )
    return functools.partial(_measure, lm, tasks, options, progress or (lambda done, total: None))


def _measure(lm: Any, tasks: Sequence[Benchmark], options: Questions, progress: Progress, who: str) -> list[Row]:
    """Evaluate every task in every mode: greedily, questions.samples times at random, and by likelihood of choices."""
    modes, done = _MODES[options.thinking], 0
    docs = [one for task in tasks for one in task.written.eval_docs]
    total = sum(len(modes) * (1 + options.samples + len(one["choices"])) for one in docs)
    total += sum(len(one["choices"]) for one in docs) if "nothink" in modes else 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    lm.progress = step
    return [row for task in tasks for mode in modes for row in _rows(lm, task, mode, options, who)]


def _rows(lm: Any, task: Benchmark, mode: str, options: Questions, who: str) -> list[Row]:
    lm.thoughts, close = int(mode == "think"), len(lm.thinker.form.close)
    samples = [_evaluate(lm, task.written)]
    if options.samples:
        samples.append(_evaluate(lm, task.written, options.temperature, options.samples))
    rows = []
    for of_question in zip(*samples, strict=True):
        doc = of_question[0]["doc"]
        replies = [reply for some in of_question for reply in some["resps"][0]]
        row = {"model": who, "mode": mode, "task": task.name, "version": task.version}
        row |= {"id": doc["id"], "subject": doc["subject"], "prompt": of_question[0]["arguments"][0][0]}
        answers = [_answer(number, reply, doc, close) for number, reply in enumerate(replies)]
        rows.append({**row, "reference": doc["answer"], "picks": {}, "answers": answers})
    if task.letters:
        for row, sample in zip(rows, _evaluate(lm, task.letters), strict=True):
            row["picks"]["loglik_letter"] = _likeliest(sample)
    if task.cloze and mode == "nothink":
        for row, sample in zip(rows, _evaluate(lm, task.cloze), strict=True):
            sizes = [len(choice.encode()) for choice in sample["doc"]["choices"]]
            row["picks"] |= {"loglik_plain": _likeliest(sample), "loglik_normalised": _likeliest(sample, sizes)}
    return rows


def _evaluate(lm: Any, task: Any, temperature: float = 0.0, repeats: int = 1) -> list[dict[str, Any]]:
    """The harness's samples of a task, a question each; thoughts are sampled at the temperature of the answers."""
    from lm_eval.evaluator import evaluate

    lm.thought_temperature = temperature
    if task.OUTPUT_TYPE == "generate_until":
        how = {"do_sample": temperature > 0, "temperature": temperature, "max_gen_toks": lm.max_gen_toks}
        task.set_config("generation_kwargs", how, update=True)
        task.set_config("repeats", repeats)
    found: Any = evaluate(lm=lm, task_dict={"tasks": {task.task_name: task}}, bootstrap_iters=0)
    return found["samples"][task.task_name]


def _answer(number: int, reply: Any, doc: Row, close: int) -> dict[str, Any]:
    """An answer in questions.jsonl, the greedy one as number 0. Lengths include the tokens that stopped it."""
    answer = dataclasses.asdict(reply.answer)
    thought = answer.pop("thought") or {"text": "", "tokens": (), "closed": False}
    length = len(thought["tokens"]) + close * thought["closed"]
    told = {"thought": thought["text"], "thought_length": length, "closed": thought["closed"]}
    return {"sample": number, **told, **answer, **_grade(doc, reply)._asdict()}


def _likeliest(sample: dict[str, Any], sizes: Sequence[int] | None = None) -> str:
    """The letter of the choice with the largest log p, or log p per byte."""
    scores = np.array([logp for logp, _ in sample["filtered_resps"]])
    return LETTERS[int(np.argmax(scores / sizes if sizes else scores))]


# Figures


def summarize(table: Columns) -> Figures:
    """Flat figures MODE/TASK/METRIC, each with /se, and MODE/{math,science,overall}/ACCURACY (docs/metrics.md)."""
    found: Figures = {}
    for (mode, task), metrics in table.items():
        for metric, values in metrics.items():
            found[f"{mode}/{task}/{metric}"] = float(values.mean())
            if len(values) > 1:
                found[f"{mode}/{task}/{metric}/se"] = float(values.std(ddof=1) / math.sqrt(len(values)))
        found[f"{mode}/{task}/questions"] = len(next(iter(metrics.values())))
    for mode in dict.fromkeys(mode for mode, _ in table):
        tasks_of_mode = [task for other, task in table if other == mode]
        areas = {area: [task for task in tasks_of_mode if task in names] for area, names in AREAS.items()}
        for area, tasks in areas.items():
            found |= ({f"{mode}/{area}/tasks": len(tasks)} if tasks else {}) | _average(found, mode, area, tasks)
        if all(areas.values()):
            found |= _average(found, mode, "overall", list(areas))
    return found


def _average(figures: Figures, mode: str, name: str, parts: Sequence[str]) -> Figures:
    """Plain means of the accuracies that every part has; the parts are independent, so variances add."""
    result: Figures = {}
    for metric in ACCURACIES:
        keys = [f"{mode}/{part}/{metric}" for part in parts]
        if keys and all(key in figures for key in keys):
            result[f"{mode}/{name}/{metric}"] = sum(figures[key] for key in keys) / len(keys)
            if all(f"{key}/se" in figures for key in keys):
                error = math.sqrt(sum(figures[f"{key}/se"] ** 2 for key in keys)) / len(keys)
                result[f"{mode}/{name}/{metric}/se"] = error
    return result


def difference(mine: Columns, theirs: Columns) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Accuracies of one model minus those of another on the same questions, question by question."""
    return {
        key: {name: some[name] - theirs[key][name] for name in ACCURACIES if name in some} for key, some in mine.items()
    }


def columns(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """By mode and task: each metric as one number per question, the mean over its answers."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["task"]), []).append(_of_question(row))
    return {key: {name: np.array([one[name] for one in some]) for name in some[0]} for key, some in groups.items()}


def _of_question(row: Row) -> dict[str, float]:
    def mean(field: str, answers: Sequence[dict[str, Any]]) -> float:
        return float(np.mean([one[field] for one in answers]))

    answers, sampled = row["answers"], row["answers"][1:]
    found = {"greedy": float(answers[0]["right"])} | ({"pass_at_1": mean("right", sampled)} if sampled else {})
    found |= {metric: float(letter == row["reference"]) for metric, letter in row["picks"].items()}
    found["extracted"] = float(np.mean([one["extracted"] is not None for one in answers]))
    found |= {"answer_length": mean("length", answers), "cut_off": mean("cut_off", answers)}
    if row["mode"] == "think":
        found |= {name: mean(name, answers) for name in ("thought_length", "closed")}
    return found
