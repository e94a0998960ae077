"""Questions with checkable answers: which tasks there are, and how their files are read.

A task is read from a local file, `NAME.jsonl`, `.jsonl.gz` or `.csv`, or from its data set on the hub. The readers know
the field names of the hub's sets and of the common copies; docs/questions.md lists them.
"""

import csv
import random
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forethought.config import Questions, UserError
from forethought.run.folder import read_jsonl
from forethought.tools.questions.answers import LETTERS

_EXTENSIONS = (".jsonl", ".jsonl.gz", ".csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A set of questions, and how it is asked and graded. What changes a figure changes the version."""

    name: str
    version: str
    kind: Literal["written", "choice"]
    area: Literal["math", "science"]
    exemplars: str = ""  # which of prompts.EXEMPLARS come before a written question
    files: tuple[str, ...] = ()  # further names of its file, without extension
    hub: tuple[str, str, str] | None = None  # id, configuration and split on the hub; None: only from a local file
    dev: str = ""  # name of the file that holds a subject's worked examples; on the hub its split `dev`
    tolerance: float = 0.0  # relative difference that a number may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question. A multiple choice has its choices, and a letter as answer; a written one has none."""

    id: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    subject: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What is asked of every model: a task's questions, and worked examples by subject where its files have them."""

    task: Task
    questions: list[Question]
    examples: dict[str, list[Question]]


_ALL = (
    Task(
        name="gsm8k",
        version="1",
        kind="written",
        area="math",
        exemplars="words",
        files=("gsm8k_test",),
        hub=("openai/gsm8k", "main", "test"),
    ),
    Task(
        name="math500",
        version="1",
        kind="written",
        area="math",
        exemplars="contest",
        files=("math_500",),
        hub=("HuggingFaceH4/MATH-500", "default", "test"),
    ),
    Task(
        name="aime24",
        version="1",
        kind="written",
        area="math",
        exemplars="contest",
        files=("aime_2024",),
        hub=("HuggingFaceH4/aime_2024", "default", "train"),
    ),
    Task(
        name="aime25",
        version="1",
        kind="written",
        area="math",
        exemplars="contest",
        files=("aime_2025",),
        hub=("math-ai/aime25", "default", "test"),
    ),
    Task(
        name="amc23",
        version="1",
        kind="written",
        area="math",
        exemplars="contest",
        files=("amc_2023",),
        hub=("math-ai/amc23", "default", "test"),
    ),
    Task(
        name="minerva",
        version="1",
        kind="written",
        area="math",
        exemplars="quantities",
        files=("minerva_math", "minervamath"),
        hub=("math-ai/minervamath", "default", "test"),
        tolerance=0.01,  # its references are rounded to a few digits
    ),
    Task(
        name="mmlu",
        version="1",
        kind="choice",
        area="science",
        files=("mmlu_test",),
        hub=("cais/mmlu", "all", "test"),
        dev="mmlu_dev",
    ),
    Task(
        name="mmlu_pro",
        version="1",
        kind="choice",
        area="science",
        files=("mmlu_pro_test",),
        hub=("TIGER-Lab/MMLU-Pro", "default", "test"),
    ),
    Task(name="gpqa", version="1", kind="choice", area="science", files=("gpqa_diamond",)),
)
TASKS = {task.name: task for task in _ALL}


def exams(options: Questions) -> list[Benchmark]:
    """The tasks of questions.tasks, in its order, each from NAME=PATH, else from questions.data, else from the hub.

    Raises UserError.
    """
    found = []
    for entry in options.tasks:
        name, _, path = entry.partition("=")
        path, task = path or options.data, TASKS[name]
        found.append(
            Benchmark(task=task, questions=load(task, path, options.limit), examples=load_examples(task, path))
        )
    return found


def load(task: Task, path: str, limit: int) -> list[Question]:
    """The questions of a task: all, or with a limit that many, evenly spaced (files are often sorted by subject).

    `path` is a file, a folder that holds the task's file, or empty for the hub. Raises UserError, for a malformed row
    with file and line.
    """
    questions = [_question(task, row, where) for row, where in _rows(task, path, "")]
    if not questions:
        raise UserError(f"questions.tasks = {task.name!r}: {path or 'the hub'} holds no question")
    count = min(limit or len(questions), len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def load_examples(task: Task, path: str) -> dict[str, list[Question]]:
    """Worked examples by subject, where the task has a file or split of them; none where that is not there."""
    if not task.dev or (path and _beside(task, path) is None):
        return {}
    examples: dict[str, list[Question]] = {}
    for row, where in _rows(task, path, task.dev):
        question = _question(task, row, where)
        examples.setdefault(question.subject, []).append(question)
    return examples


def _rows(task: Task, path: str, dev: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Rows, each with what names it in errors."""
    if not path:
        yield from _read_hub(task, dev)
        return
    file = _beside(task, path) if dev else _locate(task, path)
    assert file is not None
    try:
        yield from _read_csv(file) if file.name.endswith(".csv") else _read_json(file)
    except OSError as error:
        raise UserError(f"questions.tasks = {task.name!r}: {file}: {error.strerror or error}") from None


def _locate(task: Task, path: str) -> Path:
    """The task's file: the path itself, or the one in that folder."""
    place = Path(path).expanduser()
    if place.is_dir():
        names = (task.name, *task.files)
        found = _first(place, names)
        if found is None:
            wanted = " or ".join(names)
            raise UserError(
                f"questions.tasks = {task.name!r}: no file {wanted} ({', '.join(_EXTENSIONS)}) in {path}; "
                f"leave the task out or name its file: {task.name}=FILE"
            )
        return found
    if not place.is_file():
        raise UserError(f"questions.data or questions.tasks, for {task.name!r}: {path}: no such file or folder")
    if not place.name.endswith(_EXTENSIONS):
        raise UserError(f"questions.tasks = {task.name!r}: {path}: must be one of {', '.join(_EXTENSIONS)}")
    return place


def _beside(task: Task, path: str) -> Path | None:
    """The file of worked examples in the folder of the task's file."""
    return _first(_locate(task, path).parent, (task.dev,))


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    candidates = (folder / f"{name}{extension}" for name in names for extension in _EXTENSIONS)
    return next((file for file in candidates if file.is_file()), None)


def _read_json(file: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    return ((row, f"{file}:{number}") for number, row in read_jsonl(file))


def _read_csv(file: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                yield {name: text for name, text in row.items() if name and text}, f"{file}:{reader.line_num}"
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file}:{reader.line_num + 1}: malformed CSV ({error})") from None


def _read_hub(task: Task, dev: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    if task.hub is None:
        raise UserError(f"questions.tasks = {task.name!r}: comes from a local file only: {task.name}=FILE")
    import datasets

    name, configuration, split = task.hub
    try:
        rows = list(datasets.load_dataset(name, configuration, split="dev" if dev else split))
    except Exception as error:  # the hub's client raises errors of any type
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"questions.tasks = {task.name!r}: {name} cannot be loaded from the hub ({type(error).__name__}: {text}); "
            "name a folder of files: questions.data"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield dict(row), f"hub:{name}:{number}"


def _question(task: Task, row: Mapping[str, Any], where: str) -> Question:
    text = _text(row, ("question", "problem", "Question"), where)
    subject = next((str(row[name]) for name in ("subject", "category", "Subdomain") if row.get(name)), "")
    name = next((str(row[key]) for key in ("id", "unique_id", "question_id", "Record ID") if key in row), where)
    if "Correct Answer" in row:
        answer, choices = _shuffled(row, text, where)
    elif choices := _choices(row, where):
        answer = _letter(row, len(choices), where)
    else:
        answer = _text(row, ("answer", "final_answer", "expected_answer"), where).split("####")[-1].strip()
        if not answer:
            raise UserError(f"{where}: the answer is empty")
    if bool(choices) != (task.kind == "choice"):
        raise UserError(f"{where}: {task.name} takes questions {'with' if not choices else 'without'} choices")
    return Question(id=name, text=text, answer=answer, choices=choices, subject=subject)


def _text(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    """The first of these fields that the row has, as text."""
    for name in names:
        if name in row:
            content = row[name]
            if isinstance(content, bool) or not isinstance(content, str | int | float) or not str(content).strip():
                raise UserError(f"{where}: field {name!r} must be text or a number, got {reprlib.repr(content)}")
            return str(content).strip()
    there = ", ".join(map(repr, list(row)[:20])) or "none"
    raise UserError(f"{where}: no field {' or '.join(map(repr, names))}, the fields are {there}")


def _choices(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    choices = row.get("choices", row.get("options"))
    if choices is None:
        return ()
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{where}: choices must be a list of 2 to {len(LETTERS)}, got {reprlib.repr(choices)}")
    if not all(isinstance(choice, str | int | float) for choice in choices):
        raise UserError(f"{where}: every choice must be text, got {reprlib.repr(choices)}")
    return tuple(str(choice).strip() for choice in choices)


def _letter(row: Mapping[str, Any], choices: int, where: str) -> str:
    """The right choice: a letter, an index from 0, or both where they agree."""
    answer, index = row.get("answer"), row.get("answer_index")
    if type(answer) is int:
        answer, index = None, answer
    letters = LETTERS[:choices]
    if answer is None and type(index) is int and 0 <= index < choices:
        answer = letters[index]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        raise UserError(f"{where}: answer must be a letter of {letters} or an index below {choices}, got {answer!r}")
    if index is not None and letters.index(answer) != index:
        raise UserError(f"{where}: answer {answer!r} is not answer_index {index!r}")
    return answer


def _shuffled(row: Mapping[str, Any], text: str, where: str) -> tuple[str, tuple[str, ...]]:
    """GPQA's file keeps the right answer apart: the choices in an order that only the question's text decides."""
    right = _text(row, ("Correct Answer",), where)
    choices = [right, *(_text(row, (f"Incorrect Answer {number}",), where) for number in (1, 2, 3))]
    order = list(range(len(choices)))
    random.Random(f"choices {text}").shuffle(order)
    return LETTERS[order.index(0)], tuple(choices[i] for i in order)
