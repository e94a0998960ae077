"""Data of a stage -> prompts, completions and the answers that completions are checked against."""

import json
import random
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forethought.config import Config, UserError
from forethought.data.corpus import Windows, check_corpus
from forethought.data.positions import ThoughtFormat
from forethought.data.readers import decode_text, numbered_lines
from forethought.tools.posttrain.stage import Stage
from forethought.tools.questions.answers import judge
from forethought.tools.questions.prompts import prompt as asked
from forethought.tools.questions.tasks import TASKS, Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One task. In tokens; `prompt` ends inside an opened thought where the stage thinks."""

    prompt: list[int]
    completion: list[int]  # empty where the data show none
    answer: str


def examples(stage: Stage, config: Config, tokenizer: Any, form: ThoughtFormat) -> list[Example]:
    """As many as the stage's steps take, in an order of the seed, files again and again. Raises UserError."""
    count = config.train.steps * config.train.batch
    make = _of_world if stage.data.startswith("world:") else _of_questions
    found, left_out = [], 0
    for one in make(stage, config, tokenizer, form):
        size = len(one.prompt) + len(one.completion)
        if stage.stage == "sft" and not one.completion:
            hint = "world:NAME/worked, or set think = false" if stage.data.startswith("world:") else "a solution"
            raise UserError(f"data = {stage.data!r}: shows no thought to learn; take {hint}")
        if stage.stage == "sft" and size > stage.max_tokens:
            left_out += 1
            if left_out > 100 * (len(found) + 1):
                raise UserError(
                    f"max_tokens = {stage.max_tokens}: {left_out} of {left_out + len(found)} rows are longer"
                )
            continue
        found.append(one)
        if len(found) == count:
            break
    return found


def _of_world(stage: Stage, config: Config, tokenizer: Any, form: ThoughtFormat) -> Iterator[Example]:
    """Documents of an embedded world up to their answer; a thought right before it is part of the completion."""
    options = replace(config.corpus, path=stage.data)
    check_corpus(options, "data")
    opening = list(form.open)
    for window in Windows(options, tokenizer, config.seed, option="data"):
        tokens, at = window.tokens, next(iter(window.marks.get("answer", ())), 0)
        if not at:
            continue
        starts = [i for i in range(at) if tokens[i : i + len(opening)] == opening]
        first = starts[-1] if starts else at
        answer = tokenizer.decode([tokens[at]]).strip()
        if stage.think:
            completion = tokens[first + len(opening) :] if starts else []
            yield Example(prompt=form.prompt_tokens(tokens[:first]), completion=completion, answer=answer)
        else:
            yield Example(prompt=tokens[:first], completion=tokens[at:], answer=answer)


def _of_questions(stage: Stage, config: Config, tokenizer: Any, form: ThoughtFormat) -> Iterator[Example]:
    """Questions of a file, asked as `forethought questions` does; what shows the way to the answer is the thought."""
    rows = list(_read(stage.data))
    rng = random.Random(f"stage {config.seed}")
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    while True:
        rng.shuffle(rows)
        for question, steps, answer in rows:
            text = asked(TASKS["gsm8k"], Question(id="", text=question, answer=answer), 0, {})
            read, said = tokenizer(text)["input_ids"], encoded(f" The answer is {answer}.")
            thought = encoded(f" {steps}") if steps else []
            if stage.think:
                completion = [*thought, *form.close, *said, *ends] if steps else []
                yield Example(prompt=form.prompt_tokens(read), completion=completion, answer=answer)
            else:
                yield Example(prompt=read, completion=[*thought, *said, *ends], answer=answer)


def _read(path: str) -> Iterator[tuple[str, str, str]]:
    """Question, worked solution (may be empty) and answer of each row. Raises UserError with file and line."""
    if not path.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"data = {path!r}: must be world:NAME/SPLIT or a file of questions, .jsonl or .jsonl.gz")
    empty = True
    try:
        for number, line in numbered_lines(path):
            where = f"{path}:{number}"
            try:
                row = json.loads(decode_text(line, path, number))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: malformed JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: a row must be an object, got {reprlib.repr(row)}")
            question, answer = row.get("question", row.get("problem")), row.get("answer")
            if not isinstance(question, str) or not isinstance(answer, str | int | float) or not str(answer).strip():
                raise UserError(f"{where}: a row must have the fields question (or problem) and answer")
            shown, _, final = str(answer).rpartition("####")
            solution = str(row.get("solution") or shown).split("####")[0]
            yield question.strip(), re.sub(r"<<[^<>]*>>", "", solution).strip(), final.strip()
            empty = False
    except OSError as error:
        raise UserError(f"data = {path!r}: {error.strerror or error}") from None
    if empty:
        raise UserError(f"data = {path!r}: holds no question")


class Verified:
    """The verifiable reward: 1 for a completion whose answer is right, else 0. Logs `answered`, the share that answer.

    The answer is what follows the first closing delimiter, where the stage thinks; a thought that never closes answers
    nothing. On an embedded world it is right when its first word is the document's, else as in `forethought questions`.
    """

    def __init__(self, stage: Stage, tokenizer: Any, form: ThoughtFormat):
        self.tokenizer, self.close = tokenizer, list(form.close) if stage.think else []
        self.right: Callable[[str, str], bool] = _first_word if stage.data.startswith("world:") else _judged

    def __call__(
        self, completion_ids: Sequence[list[int]], answer: Sequence[str], log_metric: Any = None, **_: Any
    ) -> list[float]:
        """One reward a completion."""
        said = [self._said(ids) for ids in completion_ids]
        if log_metric is not None:
            log_metric("answered", sum(text is not None for text in said) / len(said))
        return [float(text is not None and self.right(text, true)) for text, true in zip(said, answer, strict=True)]

    def _said(self, ids: list[int]) -> str | None:
        size = len(self.close)
        for i in range(len(ids) - size + 1):
            if ids[i : i + size] == self.close:
                return self.tokenizer.decode(ids[i + size :], skip_special_tokens=True)
        return None


def _first_word(text: str, answer: str) -> bool:
    return text.split()[:1] == [answer]


def _judged(text: str, answer: str) -> bool:
    return judge(text, answer).right
