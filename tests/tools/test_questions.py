"""Questions: files of every shape, prompts, generation against transformers' own, figures by hand, the command."""

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import forethought
from forethought.cli import main
from forethought.config import Questions, UserError, from_dict, load, merge
from forethought.data.positions import make_generator, thought_format
from forethought.models.loading import load_model, load_tokenizer
from forethought.rollout.native import Sampling, generate
from forethought.tools.questions import prompts, questions, tasks
from forethought.tools.questions.answers import checker, judge, matches
from forethought.tools.questions.ask import ask
from forethought.tools.questions.choices import continuation, continuation_logp, pick_letters, pick_texts
from forethought.tools.questions.prompts import EXEMPLARS
from forethought.tools.questions.questions import Answer, Record
from forethought.tools.questions.tasks import TASKS, Question
from forethought.trainer import train
from helpers.cli import complaint
from helpers.docs import backticked
from helpers.models import MODELS, plain_targets, qwen3, word_tokenizer
from helpers.runs import options

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 5, 6], [7, 7], [5, 6, 7]]
WRITTEN = {"id": "w-0", "question": "What is 2 + 3?", "answer": "5"}
CHOICE = {"id": "c-0", "question": "Which is a?", "choices": ["b", "a", "c"], "answer": "B", "subject": "letters"}


def never(tokens: Any) -> bool:
    return False


def streams(count: int) -> list[torch.Generator]:
    return [make_generator(0, i) for i in range(count)]


def write(path: Path, *rows: Any) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


# generation


@pytest.mark.parametrize("name", MODELS)
def test_greedy_texts_are_those_of_transformers(name: str):
    model = MODELS[name]()
    texts = generate(model, PROMPTS, Sampling(limit=8, temperature=0.0), never, streams(5))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        row = torch.tensor([prompt])
        expected = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert text == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_sampled_texts_do_not_depend_on_the_batch(name: str):
    model = MODELS[name]()
    many = [[5 + (7 * i + j * j) % 7 for j in range(1 + i * 5 % 12)] for i in range(14)] + PROMPTS

    def texts(rows: int, order: list[int]) -> list[list[int]]:
        every = streams(len(many))
        sampling = Sampling(limit=10, temperature=0.9, top_p=0.9, rows=rows)
        chosen = [many[i] for i in order]
        found = generate(model, chosen, sampling, lambda tokens: tokens[-1] in (0, 1, 5), [every[i] for i in order])
        return [found[order.index(i)] for i in range(len(many))]

    there, back = list(range(len(many))), list(range(len(many)))[::-1]
    whole = texts(len(many), there)
    assert whole == texts(1, there) == texts(4, back)
    assert whole[-5] != whole[-1], "one prompt, two streams"
    assert len({len(text) for text in whole}) > 2


def test_a_row_stops_with_the_token_that_stopped_it():
    model = qwen3()
    free = generate(model, PROMPTS, Sampling(limit=12, temperature=0.0), never, streams(5))
    ends = {text[3] for text in free}
    texts = generate(model, PROMPTS, Sampling(limit=12, temperature=0.0), lambda some: some[-1] in ends, streams(5))
    for text, whole in zip(texts, free, strict=True):
        first = next(i for i, token in enumerate(whole) if token in ends)
        assert text == whole[: first + 1]


def test_the_limit_and_the_progress():
    model, told = qwen3(), []
    sampling = Sampling(limit=3, temperature=0.0, rows=2)
    texts = generate(model, PROMPTS, sampling, never, streams(5), told.append)
    assert [len(text) for text in texts] == [3] * 5
    assert told == [2, 2, 1]
    assert generate(model, [], sampling, never, []) == []


def test_a_forbidden_first_token_may_follow_later():
    model = qwen3()
    free = generate(model, PROMPTS * 4, Sampling(limit=12, temperature=1.5), never, streams(20))
    token = free[0][0]
    texts = generate(model, PROMPTS * 4, Sampling(limit=12, temperature=1.5, not_first=token), never, streams(20))
    assert all(text[0] != token for text in texts)
    assert any(token in text for text in texts)


@torch.no_grad()
def test_sampling_follows_the_distribution():
    model = qwen3()
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.8
    texts = generate(model, [[5, 6, 7]] * 3000, Sampling(limit=1, temperature=0.8, rows=500), never, streams(3000))
    counts = torch.bincount(torch.tensor([text[0] for text in texts]), minlength=len(logits)) / 3000
    assert float((counts - logits.softmax(-1)).abs().max()) < 0.03


def test_a_stop_string_is_found_across_tokens_and_an_end_token_too():
    stop = questions.stop_at(word_tokenizer(), ["b c", "zzz"], frozenset({11}))
    a, b, c, g = 5, 6, 7, 11
    assert not stop([a, b])
    assert stop([a, b, c])
    assert stop([a, g])
    assert not stop([c, b])
    assert stop([a] * 50 + [b, c])


# likelihood


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_likelihood_of_a_continuation_is_the_plain_one(name: str):
    model = MODELS[name]()
    rows = [([5, 6, 7], [8]), ([5, 6, 7], [9]), ([5, 6, 7], [8, 9, 10]), ([8], [5, 6]), ([5, 6, 7, 8], [11])]
    for batch in (1, 2, 10):
        told: list[int] = []
        got = continuation_logp(model, rows, batch, told.append)
        expected = [float(plain_targets(model, list(context), list(tokens)).sum()) for context, tokens in rows]
        assert got == pytest.approx(expected, abs=1e-4)
        assert sum(told) == len(rows)


@torch.no_grad()
def test_letters_and_texts_are_picked_as_a_naive_computation_picks_them():
    model, tokenizer = qwen3(), word_tokenizer()
    asked = [
        Question(id=str(i), text=text, answer="A", choices=("a b c", "d", "e f g a b", "c d"))
        for i, text in enumerate(["a b", "c d e", "f", "g g", "b a d", "e c"])
    ]
    contexts = [[5, 6], [7, 8, 9], [10], [11, 11], [6, 5, 8], [9, 7]]
    letters = [[(context, [token]) for token in (5, 6, 7, 8)] for context in contexts]
    picked = pick_letters(model, asked, letters, 3, lambda done: None)
    for pick, rows in zip(picked, letters, strict=True):
        scores = [float(plain_targets(model, list(context), list(tokens)).sum()) for context, tokens in rows]
        assert pick["loglik_letter"] == "ABCD"[scores.index(max(scores))]

    def naive(question: Question) -> dict[str, str]:
        context = tokenizer(f"Question: {question.text}\nAnswer:")["input_ids"]
        plain = [
            float(plain_targets(model, context, tokenizer(choice)["input_ids"]).sum()) for choice in question.choices
        ]
        per_byte = [score / (1 + len(choice)) for score, choice in zip(plain, question.choices, strict=True)]
        return {
            "loglik_plain": "ABCD"[plain.index(max(plain))],
            "loglik_normalised": "ABCD"[per_byte.index(max(per_byte))],
        }

    texts = pick_texts(model, tokenizer, asked, (0, {}, 4), lambda done: None)
    assert texts == [naive(question) for question in asked]
    assert any(pick["loglik_plain"] != pick["loglik_normalised"] for pick in texts), "the test must tell them apart"


def test_a_continuation_is_tokenized_with_its_prompt():
    assert continuation(word_tokenizer(), "a b", "c d") == [7, 8]
    assert continuation(word_tokenizer(bos=True), "a", "b") == [6]


# files


def options_of(data: Path | str, names: str, **more: Any) -> Questions:
    return Questions(tasks=tuple(names.split(",")), data=str(data), **more)


def test_files_of_every_shape(tmp_path: Path):
    write(tmp_path / "gsm8k_test.jsonl", {"question": "q", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"}, WRITTEN)
    write(tmp_path / "math500.jsonl", {"unique_id": "a/1.json", "problem": "p", "answer": "\\frac{1}{2}", "level": 2})
    write(tmp_path / "amc23.jsonl.gz", {"id": 3, "question": "q", "answer": 27.0})
    write(tmp_path / "minerva_math.jsonl", WRITTEN | {"subject": "Astronomy"})
    write(tmp_path / "mmlu.jsonl.gz", CHOICE, {"question": "q", "choices": ["x", "y"], "answer": 1, "subject": "s"})
    write(
        tmp_path / "mmlu_pro.jsonl",
        {"question_id": 70, "question": "q", "options": list("abcdefghij"), "answer": "J", "answer_index": 9},
    )
    found = {
        exam.task.name: exam.questions for exam in tasks.exams(options_of(tmp_path, "gsm8k,math500,amc23,minerva"))
    }
    assert [(one.id, one.answer) for one in found["gsm8k"]] == [
        (f"{tmp_path}/gsm8k_test.jsonl:1", "1,005"),
        ("w-0", "5"),
    ]
    assert found["math500"] == [Question(id="a/1.json", text="p", answer="\\frac{1}{2}")]
    assert found["amc23"][0].answer == "27.0"
    assert judge("The answer is 27", found["amc23"][0].answer).right
    assert found["minerva"][0].subject == "Astronomy"
    mmlu, pro = tasks.exams(options_of(tmp_path, "mmlu,mmlu_pro"))
    choices = ("b", "a", "c")
    assert mmlu.questions[0] == Question(id="c-0", text="Which is a?", answer="B", choices=choices, subject="letters")
    assert (mmlu.questions[1].answer, mmlu.questions[1].choices) == ("B", ("x", "y"))
    assert (pro.questions[0].id, pro.questions[0].answer, len(pro.questions[0].choices)) == ("70", "J", 10)


def test_gpqa_comes_from_the_file_that_its_authors_give_out(tmp_path: Path):
    file = tmp_path / "gpqa_diamond.csv"
    file.write_text(
        "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Subdomain\n"
        'r1,"Which, of these?",right,one,"two\nlines",three,Physics\n'
        "r2,And now?,yes,no,maybe,never,Chemistry\n"
    )
    [exam] = tasks.exams(options_of(tmp_path, "gpqa"))
    assert tasks.exams(options_of("", f"gpqa={file}")) == [exam]
    for question, right in zip(exam.questions, ("right", "yes"), strict=True):
        assert question.choices["ABCD".index(question.answer)] == right
        assert len(set(question.choices)) == 4
    assert exam.questions[0].subject == "Physics"
    many: list[Question] = []
    for i in range(40):
        row = {"Question": f"q{i}", "Correct Answer": "r", **{f"Incorrect Answer {n}": str(n) for n in (1, 2, 3)}}
        many += tasks.load(TASKS["gpqa"], str(write(tmp_path / "one.jsonl", row)), 0)
    assert {question.answer for question in many} == set("ABCD")


def test_worked_examples_by_subject_are_found_beside_the_file(tmp_path: Path):
    write(tmp_path / "mmlu.jsonl", CHOICE)
    assert tasks.exams(options_of(tmp_path, "mmlu"))[0].examples == {}
    dev = CHOICE | {"id": "dev", "question": "Which is b?", "answer": "A"}
    write(tmp_path / "mmlu_dev.jsonl", dev, dev | {"subject": "other"})
    [exam] = tasks.exams(options_of(tmp_path, "mmlu"))
    assert {subject: [one.text for one in some] for subject, some in exam.examples.items()} == {
        "letters": ["Which is b?"],
        "other": ["Which is b?"],
    }
    assert tasks.load_examples(TASKS["mmlu"], str(tmp_path / "mmlu.jsonl")) == exam.examples
    text = prompts.prompt(exam.task, exam.questions[0], 4, exam.examples)
    assert text == (
        "Question: Which is b?\nA. b\nB. a\nC. c\nAnswer: A\n\nQuestion: Which is a?\nA. b\nB. a\nC. c\nAnswer:"
    )


def test_a_limit_takes_questions_from_all_over_the_file(tmp_path: Path):
    rows = [{"id": i, "question": "q", "answer": "1"} for i in range(10)]
    write(tmp_path / "gsm8k.jsonl", *rows)

    def ids(limit: int) -> list[str]:
        return [question.id for question in tasks.load(TASKS["gsm8k"], str(tmp_path), limit)]

    assert ids(4) == ["0", "2", "5", "7"]
    assert ids(0) == ids(10) == ids(99) == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("gsm8k", b'{"question": "q", "answer": "5"}\n{', ":2: malformed JSON"),
        ("gsm8k", b"[1]", ":1: a row must be an object, got [1]"),
        (
            "gsm8k",
            b'\n\n{"answer": "5"}',
            ":3: no field 'question' or 'problem' or 'Question', the fields are 'answer'",
        ),
        ("gsm8k", b'{"question": "q"}', ":1: no field 'answer' or 'final_answer' or 'expected_answer'"),
        ("gsm8k", b'{"question": "q", "answer": null}', ":1: field 'answer' must be text or a number, got None"),
        ("gsm8k", b'{"question": " ", "answer": "5"}', ":1: field 'question' must be text or a number, got ' '"),
        ("gsm8k", b'{"question": "q", "answer": "5 ####"}', ":1: the answer is empty"),
        ("gsm8k", b'{"question": "\xff", "answer": "5"}', ":1: not UTF-8"),
        (
            "gsm8k",
            b'{"question": "q", "choices": ["a", "b"], "answer": "A"}',
            ":1: gsm8k takes questions without choices",
        ),
        ("mmlu", b'{"question": "q", "answer": "5"}', ":1: mmlu takes questions with choices"),
        ("mmlu", b'{"question": "q", "choices": ["a"], "answer": "A"}', ":1: choices must be a list of 2 to 10"),
        ("mmlu", b'{"question": "q", "choices": "ab", "answer": "A"}', ":1: choices must be a list of 2 to 10"),
        ("mmlu", b'{"question": "q", "choices": ["a", []], "answer": "A"}', ":1: every choice must be text"),
        ("mmlu", b'{"question": "q", "choices": ["a", "b"], "answer": "C"}', ":1: answer must be a letter of AB"),
        ("mmlu", b'{"question": "q", "choices": ["a", "b"], "answer": 2}', ":1: answer must be a letter of AB"),
        ("mmlu", b'{"question": "q", "choices": ["a", "b"]}', ":1: answer must be a letter of AB"),
        (
            "mmlu",
            b'{"question": "q", "choices": ["a", "b"], "answer": "A", "answer_index": 1}',
            ":1: answer 'A' is not answer_index 1",
        ),
    ],
)
def test_a_malformed_file_is_named_with_its_line(task: str, content: bytes, message: str, tmp_path: Path):
    file = tmp_path / f"{task}.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        tasks.load(TASKS[task], str(tmp_path), 0)
    assert f"{file}{message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_malformed_and_empty_files_of_other_kinds_are_named_too(tmp_path: Path):
    (tmp_path / "gpqa.csv").write_bytes(b"Question,Correct Answer\nq,r\n")
    with pytest.raises(UserError, match=r"gpqa.csv:2: no field 'Incorrect Answer 1'"):
        tasks.load(TASKS["gpqa"], str(tmp_path), 0)
    (tmp_path / "gpqa.csv").write_bytes(b'Question,Correct Answer\n"q" x,r\n')
    with pytest.raises(UserError, match=r"gpqa.csv:2: malformed CSV"):
        tasks.load(TASKS["gpqa"], str(tmp_path), 0)
    (tmp_path / "mmlu.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"mmlu.jsonl.gz:1: broken or truncated gzip"):
        tasks.load(TASKS["mmlu"], str(tmp_path), 0)
    (tmp_path / "gsm8k.jsonl").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"questions.tasks = 'gsm8k': .* holds no question"):
        tasks.load(TASKS["gsm8k"], str(tmp_path), 0)


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        ("gsm8k", "nothing", "questions.data or questions.tasks, for 'gsm8k': nothing: no such file or folder"),
        ("gsm8k", ".", "questions.tasks = 'gsm8k': no file gsm8k or gsm8k_test (.jsonl, .jsonl.gz, .csv) in ."),
        ("gsm8k=some.txt", "", "questions.tasks = 'gsm8k': some.txt: must be one of .jsonl, .jsonl.gz, .csv"),
        ("gpqa", "", "questions.tasks = 'gpqa': comes from a local file only: gpqa=FILE"),
    ],
)
def test_a_task_without_its_file_says_what_to_do(
    names: str, data: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.txt").write_text("x")
    with pytest.raises(UserError) as error:
        tasks.exams(options_of(data, names))
    assert str(error.value).startswith(message)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"^questions.tasks = 'aime25': math-ai/aime25 cannot be loaded from the hub"):
        tasks.exams(options_of("", "aime25"))


def test_the_tasks_are_those_of_the_option_and_of_the_page():
    assert load(None, ["--questions.tasks", ",".join(TASKS)]).questions.tasks == tuple(TASKS)
    assert set(load().questions.tasks) == {name for name, task in TASKS.items() if task.hub}
    page = backticked("docs/questions.md")
    assert set(TASKS) | {task.hub[0] for task in TASKS.values() if task.hub} <= page


@pytest.mark.parametrize("names", ["gsm9k", "gsm8k,zork", "gsm8k=", ""])
def test_an_unknown_task_is_refused_with_the_known_ones(names: str):
    with pytest.raises(UserError, match=r"^questions.tasks.\d = .*: string should match pattern '\^\(gsm8k\|math500"):
        load(None, ["--questions.tasks", names])


# prompts


def test_every_worked_example_answers_itself():
    for name, some in EXEMPLARS.items():
        task = next(task for task in TASKS.values() if task.exemplars == name)
        for one in some:
            text = prompts.prompt(task, Question(id="", text="?", answer="0"), len(some), {})
            assert one.question in text
            number = one.answer.removeprefix("$\\boxed{").removesuffix("}$")
            assert judge(f"{one.steps} The answer is {one.answer}.", number).right
    sums = [re.findall(r"([\d+*/ -]*\d) = (\d+)", one.steps) for one in EXEMPLARS["words"]]
    assert all(some and all(matches(left, right) for left, right in some) for some in sums)
    assert {len(some) for some in EXEMPLARS.values()} == {8, 4}
    assert {one.answer for one in prompts.CHOICES} == set("ABCD")


def test_prompts_to_the_letter():
    question = Question(id="", text="What is 2 + 3?", answer="5")
    assert prompts.prompt(TASKS["gsm8k"], question, 0, {}) == "Question: What is 2 + 3?\nAnswer:"
    one = prompts.prompt(TASKS["math500"], question, 1, {})
    assert one == (
        "Question: If $3x - 7 = 11$, what is $x^2$?\nAnswer: Then $3x = 18$, so $x = 6$ and $x^2 = 36$. "
        "The answer is $\\boxed{36}$.\n\nQuestion: What is 2 + 3?\nAnswer:"
    )
    assert prompts.prompt(TASKS["gsm8k"], question, 99, {}).count("Question:") == 9
    choice = Question(id="", text="Which?", answer="B", choices=("x", "y"))
    assert prompts.prompt(TASKS["mmlu_pro"], choice, 0, {}) == "Question: Which?\nA. x\nB. y\nAnswer:"
    assert prompts.cloze(choice, 0, {}) == "Question: Which?\nAnswer:"
    assert prompts.cloze(choice, 1, {}) == (
        "Question: Which of these particles carries a negative charge?\nAnswer: the electron\n\n"
        "Question: Which?\nAnswer:"
    )


# figures


def record(task: str, right: list[bool], mode: str = "nothink", lengths: int = 4, **picks: str) -> Record:
    answers = tuple(
        Answer(
            sample=i,
            thought="",
            thought_length=2,
            closed=i == 0,
            text="",
            length=lengths,
            cut_off=False,
            extracted=None if i == 1 else "5",
            how="last" if i == 0 else "said",
            right=one,
        )
        for i, one in enumerate(right)
    )
    choices = ("x", "y") if TASKS[task].kind == "choice" else ()
    question = Question(id="", text="", answer="A", choices=choices)
    return Record(task=task, mode=mode, question=question, prompt="", answers=answers, picks=picks)


def test_figures_by_hand():
    records = [
        record("gsm8k", [True, True, True], lengths=2),
        record("gsm8k", [False, True, False], lengths=6),
        record("gsm8k", [True, False, False], lengths=4),
    ]
    figures = questions.summarize(records)
    assert figures["nothink/gsm8k/pass_at_1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert figures["nothink/gsm8k/pass_at_1/se"] == pytest.approx(0.5 / math.sqrt(3))
    assert figures["nothink/gsm8k/greedy"] == pytest.approx(2 / 3)
    assert figures["nothink/gsm8k/greedy/se"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert figures["nothink/gsm8k/extracted"] == pytest.approx(2 / 3)
    assert figures["nothink/gsm8k/stated"] == pytest.approx(2 / 3)
    assert figures["nothink/gsm8k/answer_length"] == 4
    assert figures["nothink/gsm8k/cut_off"] == 0
    assert figures["nothink/gsm8k/questions"] == 3
    assert figures["nothink/math/greedy"] == figures["nothink/gsm8k/greedy"]
    assert figures["nothink/math/tasks"] == 1
    assert not [name for name in figures if "overall" in name or "thought" in name or "closed" in name]


def test_many_answers_to_one_question_are_no_more_questions():
    """The standard error is clustered: copies of an answer tell nothing new."""
    few = questions.summarize([record("gsm8k", [True, one]) for one in (True, False, True)])
    many = questions.summarize([record("gsm8k", [True] + [one] * 9) for one in (True, False, True)])
    assert few["nothink/gsm8k/pass_at_1/se"] == pytest.approx(many["nothink/gsm8k/pass_at_1/se"])


def test_averages_weigh_tasks_alike_and_add_variances():
    records = [record("gsm8k", [one]) for one in (True, True, False, False)]
    records += [record("aime25", [one]) for one in (True, False)]
    records += [record("mmlu", [True], loglik_letter=letter) for letter in "AB"]
    figures = questions.summarize(records)
    se = {task: figures[f"nothink/{task}/greedy/se"] for task in ("gsm8k", "aime25", "mmlu")}
    assert se["gsm8k"] == pytest.approx(math.sqrt(1 / 3) / 2)
    assert figures["nothink/math/greedy"] == 0.5
    assert figures["nothink/math/greedy/se"] == pytest.approx(math.hypot(se["gsm8k"], se["aime25"]) / 2)
    assert figures["nothink/math/tasks"] == 2
    assert figures["nothink/science/loglik_letter"] == 0.5
    assert figures["nothink/overall/greedy"] == pytest.approx((0.5 + 1) / 2)
    assert "nothink/overall/loglik_letter" not in figures
    assert "nothink/math/pass_at_1" not in figures


def test_modes_are_kept_apart_and_thoughts_are_counted():
    records = [record("gsm8k", [True, False], mode) for mode in ("nothink", "think") for _ in range(2)]
    figures = questions.summarize(records)
    assert figures["think/gsm8k/thought_length"] == 2
    assert figures["think/gsm8k/closed"] == 0.5
    assert "nothink/gsm8k/closed" not in figures


def test_one_question_has_no_standard_error():
    figures = questions.summarize([record("gsm8k", [True])])
    assert figures["nothink/gsm8k/greedy"] == 1
    assert not [name for name in figures if name.endswith("/se")]


def test_the_difference_to_the_base_is_paired():
    mine = [record("gsm8k", [one]) for one in (True, True, True, False)]
    base = [record("gsm8k", [one]) for one in (False, True, True, False)]
    figures = questions.over_base(mine, base)
    assert figures["nothink/gsm8k/greedy"] == 0.25
    assert figures["nothink/gsm8k/greedy/se"] == pytest.approx(0.25)  # of 1, 0, 0, 0
    assert "nothink/gsm8k/answer_length" not in figures


# whole measurements


def exams(tmp_path: Path) -> Path:
    """A folder of two tasks in words that the embedded tokenizer knows."""
    folder = tmp_path / "exams"
    folder.mkdir(exist_ok=True)
    rows = [{"id": str(i), "question": f"ball {i} . swap {i} {i + 1}", "answer": str(i)} for i in range(4)]
    write(folder / "gsm8k.jsonl", *rows)
    write(folder / "mmlu.jsonl", *[row | {"choices": ["1 ;", "2 ;", "ball"], "answer": "B"} for row in rows])
    return folder


def setup(tmp_path: Path, **changes: Any) -> tuple[Any, ...]:
    asked = {"tasks": ["gsm8k", "mmlu"], "data": str(exams(tmp_path)), "shots": 0, "samples": 2, "max_tokens": 6}
    config = from_dict(options(tmp_path, "run", **merge({"questions": asked}, changes)))
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, config.seed)
    return model, thought_format(tokenizer, config.method), tokenizer, tasks.exams(config.questions), config


def silent(done: int, total: int) -> None:
    pass


def test_a_measurement_is_the_same_in_every_batch_and_counts_its_work(tmp_path: Path):
    told: list[tuple[int, int]] = []
    whole = questions.measure(*setup(tmp_path), lambda done, total: told.append((done, total)))
    assert whole == questions.measure(*setup(tmp_path, questions={"batch": 3}), silent)
    assert whole != questions.measure(*setup(tmp_path, seed=1), silent)
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert [(one.task, one.mode) for one in whole[::4]] == [
        ("gsm8k", "nothink"),
        ("gsm8k", "think"),
        ("mmlu", "nothink"),
        ("mmlu", "think"),
    ]
    assert [[answer.sample for answer in one.answers] for one in whole] == [[0, 1, 2]] * 16
    assert set(whole[8].picks) == {"loglik_letter", "loglik_plain", "loglik_normalised"}
    assert set(whole[-1].picks) == {"loglik_letter"}


def test_samples_are_drawn_each_on_its_own(tmp_path: Path):
    for one in questions.measure(*setup(tmp_path, questions={"max_tokens": 10}), silent):
        texts = [answer.text for answer in one.answers]
        assert len(set(texts)) == 3, "greedy, and two samples"
        thoughts = [answer.thought for answer in one.answers]
        assert (len(set(thoughts)) > 1) == (one.mode == "think")


@pytest.mark.parametrize("close", ["</think>", "learned"])
@torch.no_grad()
def test_thinking_reads_the_same_prompt_and_the_thought_before_it_answers(tmp_path: Path, close: str):
    """Greedy thought and answer, made again by plain one-row forwards; once with thoughts that close themselves."""
    asked = {"samples": 0, "thinking": "with"}
    if close == "learned":
        free = questions.measure(*setup(tmp_path, questions=asked), silent)
        close = free[0].answers[0].thought.split()[-1]
    model, form, tokenizer, some, config = setup(tmp_path, questions=asked, method={"close": close})
    seen = set()
    for one in questions.measure(model, form, tokenizer, some, config, silent):
        [answer] = one.answers
        tokens = form.prompt_tokens(tokenizer(one.prompt)["input_ids"])
        thought: list[int] = []
        while len(thought) < config.method.thought_length and thought[-1:] != list(form.close):
            logits = model(input_ids=torch.tensor([tokens + thought])).logits[0, -1]
            if not thought:
                logits[form.close[0]] = -torch.inf
            thought.append(int(logits.argmax()))
        closed = thought[-1:] == list(form.close)
        seen.add(closed)
        assert (answer.closed, answer.thought_length) == (closed, len(thought))
        assert answer.thought == tokenizer.decode(thought[:-1] if closed else thought)
        tokens = tokens + thought + ([] if closed else list(form.close))
        text: list[int] = []
        while len(text) < config.questions.max_tokens and text[-1:] != [tokenizer.eos_token_id]:
            text.append(int(model(input_ids=torch.tensor([tokens + text])).logits[0, -1].argmax()))
        assert answer.text == tokenizer.decode(text, skip_special_tokens=True)
        assert answer.cut_off == (text[-1] != tokenizer.eos_token_id)
        if one.picks:
            continued = [continuation(tokenizer, one.prompt, letter) for letter in "ABC"]
            scores = [float(plain_targets(model, tokens, letter).sum()) for letter in continued]
            assert one.picks["loglik_letter"] == "ABC"[scores.index(max(scores))]
    assert close == "</think>" or True in seen


def test_an_answer_ends_where_the_next_question_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setting = setup(tmp_path, questions={"samples": 0, "thinking": "without", "max_tokens": 12})
    free = [one.answers[0] for one in questions.measure(*setting, silent)]
    words = [answer.text.split() for answer in free]
    word = next(word for word in words[0][1:] if word not in words[0][0])
    monkeypatch.setattr(questions, "STOPS", (word,))
    cut = [one.answers[0] for one in questions.measure(*setting, silent)]
    assert cut[0].text.split() == words[0][: words[0].index(word)]
    for before, after in zip(free, cut, strict=True):
        place = before.text.split().index(word) if word in before.text.split() else None
        assert after.cut_off == (place is None)
        assert after.length == (before.length if place is None else place + 1)


def test_prompts_without_room_are_refused(tmp_path: Path):
    model, form, tokenizer, some, config = setup(tmp_path, questions={"max_tokens": 250})
    with pytest.raises(
        UserError, match=r"^questions.shots = 0: a prompt of gsm8k has .* more than the model's 256; lower"
    ):
        questions.check_room(model, form, tokenizer, some, config)
    model, form, tokenizer, some, config = setup(tmp_path)
    questions.check_room(model, form, tokenizer, some, config)


def test_answers_are_graded_by_their_task():
    task, question = TASKS["gsm8k"], Question(id="", text="", answer="5")
    assert questions.judge(task, question, "The answer is 5.").right
    assert not questions.judge(TASKS["mmlu"], Question(id="", text="", answer="B", choices=("x", "y")), "A").right
    assert questions.judge(TASKS["minerva"], Question(id="", text="", answer="41.8"), r"\boxed{41.9}").right


# the command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    start = from_dict(options(tmp_path, "none")).model
    load_model(start, 0).save_pretrained(tmp_path / "model")
    load_tokenizer(start).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def command(target: Path, data: Path) -> list[str]:
    chosen = {"data": data, "tasks": "gsm8k,mmlu", "shots": 0, "samples": 1, "max_tokens": 4}
    words = [f"--questions.{name}={value}" for name, value in chosen.items()]
    return ["questions", str(target), "--method.thought_length=4", *words]


def test_asking_a_model_writes_figures_and_every_answer(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(command(model, exams(tmp_path))) == 0
    out = capsys.readouterr().out
    for word in ("gsm8k: 4 asked", "mmlu: 4 asked", "pass@1", "likeliest letter", "no thought", "overall average"):
        assert word in out
    folder = tmp_path / "runs" / "questions-model"
    figures = json.loads((folder / "questions.json").read_text())
    assert figures["checker"] == checker()
    assert figures["version/gsm8k"] == TASKS["gsm8k"].version
    names = {name.removesuffix("/se").split("/")[-1] for name in figures if name.split("/")[0] != "version"}
    assert names <= backticked("docs/metrics.md")
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 4
    for mode in ("nothink", "think"):
        right = [row["answers"][0]["right"] for row in rows if (row["task"], row["mode"]) == ("gsm8k", mode)]
        assert figures[f"model/{mode}/gsm8k/greedy"] == sum(right) / 4
    assert rows[0]["prompt"] == "Question: ball 0 . swap 0 1\nAnswer:"
    assert {"thought", "text", "extracted", "how", "right", "length", "cut_off"} <= set(rows[0]["answers"][0])
    assert main(command(model, exams(tmp_path))) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    asked = {"data": str(exams(tmp_path)), "tasks": ["gsm8k"], "shots": 0, "samples": 0, "max_tokens": 4}
    again, file = ask(model, {"questions": asked, "method": {"thought_length": 4}, "run": "other"})
    assert file == Path("other/questions.json")
    assert again["model/nothink/gsm8k/answer_length"] > 0
    other = [json.loads(line) for line in Path("other/questions.jsonl").read_text().splitlines()]
    assert [row["answers"] for row in other[:4]] == [row["answers"][:1] for row in rows[:4]]
    assert forethought.ask is ask


def test_asking_a_run_asks_its_start_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(from_dict(options(tmp_path, "run", train={"steps": 2})))
    assert main(command(tmp_path / "run", exams(tmp_path))) == 0
    out = capsys.readouterr().out
    assert out.count("trained,") == out.count("base,") == 2
    assert "…" not in out, "it fits into 80 columns"
    figures = json.loads((tmp_path / "run" / "questions.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "questions.jsonl").read_text().splitlines()]
    by_model = {who: [row for row in rows if row["model"] == who] for who in ("model", "base")}
    assert [row["prompt"] for row in by_model["model"]] == [row["prompt"] for row in by_model["base"]]
    assert [row["answers"] for row in by_model["model"]] != [row["answers"] for row in by_model["base"]]
    for name in ("nothink/gsm8k/greedy", "think/mmlu/loglik_letter", "think/overall/pass_at_1"):
        assert figures[f"over_base/{name}"] == pytest.approx(figures[f"model/{name}"] - figures[f"base/{name}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "questions takes a run folder or a model"),
        (["--questions.limit", "3"], "questions takes a run folder or a model"),
        (
            ["embedded", "--questions.data", "nothing"],
            "questions.data or questions.tasks, for 'gsm8k': nothing: no such file or folder",
        ),
        (["embedded", "--questions.tasks", "zork"], "questions.tasks.0 = 'zork': string should match pattern"),
        (["embedded", "--questions.tasks", "gpqa"], "questions.tasks = 'gpqa': comes from a local file only"),
        (["embedded", "--questions.batch", "0"], "questions.batch = 0"),
        (["./nothing", "--questions.tasks", "gsm8k=g.jsonl"], "model.path = './nothing' cannot be loaded"),
        (["embedded", "--questions.tasks", "gsm8k=g.jsonl"], "questions.shots = 4: a prompt of gsm8k has "),
        (["embedded", "--questions.tasks", "gsm8k=b.jsonl"], "b.jsonl:1: malformed JSON"),
    ],
)
def test_a_wrong_command_is_one_line_and_leaves_nothing(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "g.jsonl", WRITTEN)
    (tmp_path / "b.jsonl").write_text("{")
    assert message in complaint(capsys, ["questions", *words])
    assert not (tmp_path / "runs").exists()
