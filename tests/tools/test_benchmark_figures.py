"""What benchmarks do without the extra `eval`: letters, figures by hand, and how to install it."""

import importlib.util
import math

import pytest

from forethought.config import UserError, load
from forethought.tools import benchmarks
from forethought.tools.benchmarks import Grade, Row, extract_letter, grade
from helpers.cli import complaint


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        (" B\n\nQuestion: next", 4, "B"),
        (" (C) because", 4, "C"),
        ("D", 4, "D"),
        ("B. True, False", 4, "B"),
        ("B, since A is wrong", 4, "B"),
        ("The answer is (C).", 4, "C"),
        ("The correct option is **D**", 4, "D"),
        ("Answer: B, not A", 4, "B"),
        ("A is wrong, so the answer is B", 4, "B"),
        (r"Thus \boxed{\text{(J)}}", 10, "J"),
        (r"Thus \boxed{B) eight}", 4, "B"),
        (r"\boxed{12} so the answer is $\text{B}$", 4, "B"),
        ("Compare (A) with (B): it must be (B)", 4, "B"),
        ("I think it is C", 10, "C"),
        ("A ball is heavy and I know it", 10, None),
        ("J", 4, None),
        ("The answer is Berlin", 4, None),
        ("The answer is E", 4, None),
        ("", 4, None),
    ],
)
def test_the_letter_that_a_text_settles_on(text: str, choices: int, letter: str | None):
    assert extract_letter(text, choices) == letter
    assert grade(text, "B", choices) == Grade(letter, letter == "B")


@pytest.mark.parametrize("names", ["gsm9k", "gsm8k,zork", "gsm8k=", ""])
def test_an_unknown_task_is_refused_with_the_known_ones(names: str):
    with pytest.raises(UserError, match=r"^questions.tasks.\d = .*: string should match pattern '\^\(gsm8k\|math500"):
        load(None, ["--questions.tasks", names])


def record(task: str, right: list[bool], mode: str = "nothink", lengths: int = 4, **picks: str) -> Row:
    answers = [
        {
            "right": one,
            "extracted": None if i == 1 else "5",
            "length": lengths,
            "cut_off": False,
            "thought_length": 2,
            "closed": i == 0,
        }
        for i, one in enumerate(right)
    ]
    return {"task": task, "mode": mode, "reference": "A", "answers": answers, "picks": picks}


def summarize(rows: list[Row]) -> benchmarks.Figures:
    return benchmarks.summarize(benchmarks.columns(rows))


def test_figures_by_hand():
    figures = summarize(
        [
            record("gsm8k", [True, True, True], lengths=2),
            record("gsm8k", [False, True, False], lengths=6),
            record("gsm8k", [True, False, False], lengths=4),
        ]
    )
    assert figures["nothink/gsm8k/pass_at_1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert figures["nothink/gsm8k/pass_at_1/se"] == pytest.approx(0.5 / math.sqrt(3))
    assert figures["nothink/gsm8k/greedy"] == pytest.approx(2 / 3)
    assert figures["nothink/gsm8k/greedy/se"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert figures["nothink/gsm8k/extracted"] == pytest.approx(2 / 3)
    assert figures["nothink/gsm8k/answer_length"] == 4
    assert figures["nothink/gsm8k/cut_off"] == 0
    assert figures["nothink/gsm8k/questions"] == 3
    assert figures["nothink/math/greedy"] == figures["nothink/gsm8k/greedy"]
    assert figures["nothink/math/tasks"] == 1
    assert not [name for name in figures if "overall" in name or "thought" in name or "closed" in name]


def test_many_answers_to_one_question_are_no_more_questions():
    """The standard error is clustered: copies of an answer tell nothing new."""
    few = summarize([record("gsm8k", [True, one]) for one in (True, False, True)])
    many = summarize([record("gsm8k", [True] + [one] * 9) for one in (True, False, True)])
    assert few["nothink/gsm8k/pass_at_1/se"] == pytest.approx(many["nothink/gsm8k/pass_at_1/se"])


def test_averages_weigh_tasks_alike_and_add_variances():
    rows = [record("gsm8k", [one]) for one in (True, True, False, False)]
    rows += [record("aime25", [one]) for one in (True, False)]
    rows += [record("mmlu", [True], loglik_letter=letter) for letter in "AB"]
    figures = summarize(rows)
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
    figures = summarize([record("gsm8k", [True, False], mode) for mode in ("nothink", "think") for _ in range(2)])
    assert figures["think/gsm8k/thought_length"] == 2
    assert figures["think/gsm8k/closed"] == 0.5
    assert "nothink/gsm8k/closed" not in figures


def test_one_question_has_no_standard_error():
    figures = summarize([record("gsm8k", [True])])
    assert figures["nothink/gsm8k/greedy"] == 1
    assert not [name for name in figures if name.endswith("/se")]


def test_the_difference_to_the_base_is_paired():
    mine = benchmarks.columns([record("gsm8k", [one]) for one in (True, True, True, False)])
    base = benchmarks.columns([record("gsm8k", [one]) for one in (False, True, True, False)])
    figures = benchmarks.summarize(benchmarks.difference(mine, base))
    assert figures["nothink/gsm8k/greedy"] == 0.25
    assert figures["nothink/gsm8k/greedy/se"] == pytest.approx(0.25)  # of 1, 0, 0, 0
    assert "nothink/gsm8k/answer_length" not in figures


@pytest.mark.parametrize("missing", ["lm_eval", "math_verify"])
def test_without_the_extra_one_line_says_how_to_install_it(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    known, packages = importlib.util.find_spec, {"lm_eval": object(), "math_verify": object(), missing: None}

    def find(name: str, *rest: str | None) -> object:
        return packages[name] if name in packages else known(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    message = complaint(capsys, ["questions", "embedded"])
    assert message == f"benchmark questions need {missing}: pip install 'forethought[eval]'"
