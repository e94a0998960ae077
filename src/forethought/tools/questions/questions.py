"""Questions with checkable answers: what a model answers, with and without a thought before, and how often it is right.

Every model is asked with the same prompts and draws with the same random numbers. A standard error is over questions:
the answers to one question are averaged first.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from forethought.config import Config, UserError
from forethought.data.positions import ThoughtFormat, make_generator
from forethought.rollout.native import Sampling, Stop, generate
from forethought.tools.questions import answers
from forethought.tools.questions.choices import Row, Step, continuation, pick_letters, pick_texts
from forethought.tools.questions.prompts import STOPS, prompt
from forethought.tools.questions.tasks import TASKS, Benchmark, Question, Task

ACCURACIES = ("pass_at_1", "greedy", "loglik_letter", "loglik_plain", "loglik_normalised")
_MODES = {"without": ("nothink",), "with": ("think",), "both": ("nothink", "think")}

Progress = Callable[[int, int], None]
Figures = dict[str, float | int]
Columns = Mapping[tuple[str, str], Mapping[str, np.ndarray]]  # (mode, task) -> metric -> one number a question
_Turn = tuple[int, int]  # which question of the exam, and which sample (0: greedy; never mixed with others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer. Lengths are in generated tokens, what stopped them included; without thinking the thought is ""."""

    sample: int  # 0: greedy; 1, 2, ...: sampled
    thought: str
    thought_length: int
    closed: bool  # whether the thought closed itself
    text: str
    length: int
    cut_off: bool  # whether the answer was still going on at questions.max_tokens
    extracted: str | None
    how: str  # see answers.Verdict
    right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One question to one model in one mode: `nothink` or `think`."""

    task: str
    mode: str
    question: Question
    prompt: str
    answers: tuple[Answer, ...]  # the greedy one first
    picks: dict[str, str] = field(default_factory=dict)  # of a choice: metric -> the likeliest letter


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What answers, and how it is asked."""

    model: Any
    form: ThoughtFormat
    tokenizer: Any
    config: Config
    step: Step


def measure(
    model: Any, form: ThoughtFormat, tokenizer: Any, exams: Sequence[Benchmark], config: Config, progress: Progress
) -> list[Record]:
    """Let a model answer every question: greedily, questions.samples times at random, and by likelihood of choices.

    The records of an exam follow each other, `nothink` before `think`, questions in order.
    """
    modes, done = _MODES[config.questions.thinking], 0
    total = sum(_work(exam, mode, config) for exam in exams for mode in modes)

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    asked = _Model(model=model, form=form, tokenizer=tokenizer, config=config, step=step)
    return [record for exam in exams for mode in modes for record in _measure_exam(asked, exam, mode)]


def check_room(model: Any, form: ThoughtFormat, tokenizer: Any, exams: Sequence[Benchmark], config: Config) -> None:
    """Refuse prompts that the model has no positions for, with thought and answer. Raises UserError."""
    room, options = getattr(model.config.get_text_config(), "max_position_embeddings", None), config.questions
    thought = form.overhead + config.method.thought_length if options.thinking != "without" else 0
    for exam in exams:
        longest = max(len(tokens) for tokens in _tokens(tokenizer, _prompts(exam, config)))
        if room is not None and longest + thought + options.max_tokens > room:
            raise UserError(
                f"questions.shots = {options.shots}: a prompt of {exam.task.name} has {longest} tokens; with {thought} "
                f"for a thought and {options.max_tokens} for an answer that is more than the model's {room}; lower "
                "questions.shots, questions.max_tokens or method.thought_length"
            )


def _work(exam: Benchmark, mode: str, config: Config) -> int:
    """Texts to generate and continuations to score."""
    texts = len(exam.questions) * (1 + config.questions.samples) * (2 if mode == "think" else 1)
    return texts + sum(len(question.choices) for question in exam.questions) * (1 if mode == "think" else 2)


def _prompts(exam: Benchmark, config: Config) -> list[str]:
    return [prompt(exam.task, question, config.questions.shots, exam.examples) for question in exam.questions]


def _tokens(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """As the model read documents in training: with the tokenizer's own special tokens."""
    return [list(tokenizer(text, truncation=False, verbose=False)["input_ids"]) for text in prompts]


def _measure_exam(asked: _Model, exam: Benchmark, mode: str) -> list[Record]:
    prompts = _prompts(exam, asked.config)
    contexts = _tokens(asked.tokenizer, prompts)
    every, samples = range(len(prompts)), asked.config.questions.samples
    greedy, read = _answer(asked, exam, contexts, [(i, 0) for i in every], mode)
    turns = [(i, 1 + sample) for i in every for sample in range(samples)]
    sampled = _answer(asked, exam, contexts, turns, mode)[0] if turns else []
    picks = _pick(asked, exam, prompts, read, mode) if exam.task.kind == "choice" else [{} for _ in prompts]
    return [
        Record(
            task=exam.task.name,
            mode=mode,
            question=exam.questions[i],
            prompt=prompts[i],
            answers=(greedy[i], *sampled[i * samples : (i + 1) * samples]),
            picks=picks[i],
        )
        for i in every
    ]


def _answer(
    asked: _Model, exam: Benchmark, contexts: Sequence[list[int]], turns: Sequence[_Turn], mode: str
) -> tuple[list[Answer], list[list[int]]]:
    """An answer for each turn, after a thought of its own where the mode is `think`; and what was read before it."""
    read, thoughts = [contexts[i] for i, _ in turns], [("", 0, False)] * len(turns)
    if mode == "think":
        thoughts, read = _think(asked, exam, read, turns)
    stop = stop_at(asked.tokenizer, STOPS, ends(asked.model, asked.tokenizer))
    sampling = _sampling(asked, turns, asked.config.questions.max_tokens)
    found = generate(asked.model, read, sampling, stop, _streams(asked, exam, turns, "answer"), asked.step)
    result = []
    for (i, sample), tokens, (thought, thought_length, closed) in zip(turns, found, thoughts, strict=True):
        text = before(asked.tokenizer.decode(tokens, skip_special_tokens=True), STOPS)
        verdict = judge(exam.task, exam.questions[i], text)
        result.append(
            Answer(
                sample=sample,
                thought=thought,
                thought_length=thought_length,
                closed=closed,
                text=text,
                length=len(tokens),
                cut_off=not stop(tokens),
                extracted=verdict.extracted,
                how=verdict.how,
                right=verdict.right,
            )
        )
    return result, read


def _think(
    asked: _Model, exam: Benchmark, contexts: Sequence[list[int]], turns: Sequence[_Turn]
) -> tuple[list[tuple[str, int, bool]], list[list[int]]]:
    """Text, length and closing of a thought after each context, and the context with it, closed by force if need be.

    As in training, a thought has at least one token and does not end with the text.
    """
    form, close = asked.form, list(asked.form.close)
    opened = [form.prompt_tokens(context) for context in contexts]
    sampling = _sampling(asked, turns, asked.config.method.thought_length, close[0])
    streams = _streams(asked, exam, turns, "thought")
    found = generate(asked.model, opened, sampling, lambda some: some[-len(close) :] == close, streams, asked.step)
    thoughts, read = [], []
    for context, tokens in zip(opened, found, strict=True):
        closed = tokens[-len(close) :] == close
        inside = tokens[: -len(close)] if closed else tokens
        thoughts.append((asked.tokenizer.decode(inside), len(tokens), closed))
        read.append([*context, *inside, *close])
    return thoughts, read


def _sampling(asked: _Model, turns: Sequence[_Turn], limit: int, not_first: int | None = None) -> Sampling:
    options = asked.config.questions
    temperature = options.temperature if turns[0][1] else 0.0
    return Sampling(limit=limit, temperature=temperature, rows=options.batch, not_first=not_first)


def _streams(asked: _Model, exam: Benchmark, turns: Sequence[_Turn], purpose: str) -> list[torch.Generator]:
    keys = [(purpose, exam.task.name, exam.questions[i].id, sample) for i, sample in turns]
    return [make_generator(asked.config.seed, "questions", *key) for key in keys]


def judge(task: Task, question: Question, text: str) -> answers.Verdict:
    """Whether a text answers a question of a task rightly."""
    if task.kind == "choice":
        return answers.judge_letter(text, question.answer, len(question.choices))
    return answers.judge(text, question.answer, task.tolerance)


def _pick(
    asked: _Model, exam: Benchmark, prompts: Sequence[str], read: Sequence[list[int]], mode: str
) -> list[dict[str, str]]:
    """Likeliest letters after what was read (with its greedy thought), and without thinking the likeliest texts too."""
    rows: list[list[Row]] = []
    for question, text, tokens in zip(exam.questions, prompts, read, strict=True):
        letters = answers.LETTERS[: len(question.choices)]
        rows.append([(tokens, continuation(asked.tokenizer, text, letter)) for letter in letters])
    options = asked.config.questions
    picks = pick_letters(asked.model, exam.questions, rows, options.batch, asked.step)
    if mode == "think":
        return picks
    shown = (options.shots, exam.examples, options.batch)
    texts = pick_texts(asked.model, asked.tokenizer, exam.questions, shown, asked.step)
    return [one | other for one, other in zip(picks, texts, strict=True)]


def stop_at(tokenizer: Any, strings: Sequence[str], ends: frozenset[int]) -> Stop:
    """Stops a row at an end token, or where the text of its last tokens holds one of the strings."""
    tail = max(map(len, strings), default=0) + 8  # tokens; one may be less than a character

    def stop(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(tokens[-tail:])
        return tokens[-1] in ends or any(string in text for string in strings)

    return stop


def ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens after which a model has no more to say."""
    own = getattr(model.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if token is not None)


def before(text: str, strings: Sequence[str]) -> str:
    """The text up to the first of the strings in it."""
    return text[: min((text.find(string) for string in strings if string in text), default=len(text))]


def summarize(records: Sequence[Record]) -> Figures:
    """Flat figures MODE/TASK/METRIC, each with /se, and MODE/{math,science,overall}/ACCURACY (docs/metrics.md)."""
    return figures(columns(records))


def over_base(records: Sequence[Record], base: Sequence[Record]) -> Figures:
    """The same of the difference to a base that was asked the same: accuracies only, errors over paired questions."""
    assert [(one.mode, one.prompt) for one in records] == [(one.mode, one.prompt) for one in base]
    return figures(difference(columns(records), columns(base)))


def difference(mine: Columns, theirs: Columns) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Accuracies of one model minus those of another that was asked the same, question by question."""
    return {
        key: {name: some[name] - theirs[key][name] for name in ACCURACIES if name in some} for key, some in mine.items()
    }


def columns(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """By mode and task: each metric as one number a question, the mean over its answers."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.mode, record.task), []).append(record)
    return {key: _columns(some) for key, some in groups.items()}


def _columns(records: Sequence[Record]) -> dict[str, np.ndarray]:
    result = {"greedy": np.array([float(record.answers[0].right) for record in records])}
    if len(records[0].answers) > 1:
        result["pass_at_1"] = np.array([np.mean([one.right for one in record.answers[1:]]) for record in records])
    for metric in records[0].picks:
        result[metric] = np.array([float(record.picks[metric] == record.question.answer) for record in records])

    def mean(value: Callable[[Answer], float]) -> np.ndarray:
        return np.array([np.mean([value(one) for one in record.answers]) for record in records])

    result["extracted"] = mean(lambda one: one.extracted is not None)
    result["stated"] = mean(lambda one: one.how in ("boxed", "marked", "said"))
    result["answer_length"] = mean(lambda one: one.length)
    result["cut_off"] = mean(lambda one: one.cut_off)
    if records[0].mode == "think":
        result["thought_length"] = mean(lambda one: one.thought_length)
        result["closed"] = mean(lambda one: one.closed)
    return result


def figures(table: Columns) -> Figures:
    """Flat figures of columns, as `summarize`."""
    found: Figures = {}
    for (mode, task), metrics in table.items():
        for metric, values in metrics.items():
            found[f"{mode}/{task}/{metric}"] = float(values.mean())
            if len(values) > 1:
                found[f"{mode}/{task}/{metric}/se"] = float(values.std(ddof=1) / math.sqrt(len(values)))
        found[f"{mode}/{task}/questions"] = len(next(iter(metrics.values())))
    for mode in dict.fromkeys(mode for mode, _ in table):
        for area in ("math", "science"):
            names = [task for other, task in table if other == mode and TASKS[task].area == area]
            found |= _average(found, mode, area, names)
        if f"{mode}/math/tasks" in found and f"{mode}/science/tasks" in found:
            found |= _average(found, mode, "overall", ["math", "science"])
    return found


def _average(figures: Figures, mode: str, name: str, parts: Sequence[str]) -> Figures:
    """Plain means of the accuracies that every part has; the parts are independent, so variances add."""
    result: Figures = {f"{mode}/{name}/tasks": len(parts)} if parts and name != "overall" else {}
    for metric in ACCURACIES:
        keys = [f"{mode}/{part}/{metric}" for part in parts]
        if not keys or not all(key in figures for key in keys):
            continue
        result[f"{mode}/{name}/{metric}"] = sum(figures[key] for key in keys) / len(keys)
        if all(f"{key}/se" in figures for key in keys):
            error = math.sqrt(sum(figures[f"{key}/se"] ** 2 for key in keys)) / len(keys)
            result[f"{mode}/{name}/{metric}/se"] = error
    return result
