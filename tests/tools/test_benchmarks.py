"""Benchmarks: data of every shape, prompts, answers and their grades, figures by hand, the command."""
# ruff: noqa: E402

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lm_eval", reason="make test-lm-eval installs the extra eval")
pytest.importorskip("math_verify", reason="make test-lm-eval installs the extra eval")
pytestmark = pytest.mark.filterwarnings("default")

import forethought
from forethought.cli import main
from forethought.config import Questions, UserError, from_dict, load, merge
from forethought.models.loading import load_model, load_tokenizer
from forethought.tools import benchmarks
from forethought.tools.benchmarks import MATH, SCIENCE, Row, grade, load_tasks, run_benchmarks
from forethought.trainer import train
from helpers.cli import complaint
from helpers.docs import backticked
from helpers.models import plain_targets
from helpers.runs import options

WRITTEN = {"id": "w-0", "question": "What is 2 + 3?", "answer": "5"}
CHOICE = {"id": "c-0", "question": "Which is a?", "choices": ["b", "a", "c"], "answer": "B", "subject": "letters"}


def write(path: Path, *rows: Any) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


# grades


@pytest.mark.parametrize(
    ("text", "extracted"),
    [
        (r"so $\boxed{42}$.", "42"),
        (r"first \boxed{1}, then $\boxed{\frac{1}{2}}$, or 7", r"\frac{1}{2}"),
        ("It is 9 * 2 = 18.\n#### 18", "18"),
        ("The answer is 18.", "18"),
        ("The final answer is: $\\frac{3}{4}$. I hope it is correct.", r"\frac{3}{4}"),
        ("The answer is 5. No, wait. The answer is 6", "6"),
        ("The answer is\n7", "7"),
        ("from 3 down to -4", "-4"),
        ("The answer is −5.", "-5"),
        ("The answer is –5", "-5"),
        ("pages 3–5", "3"),
        ("The answer is 5-10=-5.", "-5"),
        (r"\boxed{3/4} then \boxed{1/2}", r"\frac{1}{2}"),
        (r"\boxed{7}. Wait, I forgot one. The answer is $x = \boxed{8}$, not 9.", "8"),
        (r"\boxed{7} then \boxed{8", "7"),
        (r"\boxed{1}. $x = \boxed{2}$, and $y = \boxed{3}$", "2 and 3"),
        (r"\boxed{2}\text{ or }\boxed{3}", "2,3"),
        ("no number here", None),
        ("", None),
    ],
)
def test_the_final_answer_of_a_text(text: str, extracted: str | None):
    assert grade(text, "no such number").extracted == extracted


SAME = [
    ("18", "18"),
    ("18.00", "18"),
    ("18.", "18"),
    (r"\$18.00", "18"),
    ("1,234", "1234"),
    (r"10,\!080", "10080"),
    ("5 cm", "5"),
    ("5", r"5\mbox{ inches}"),
    ("1/2", r"\frac{1}{2}"),
    (r"\frac12", r"\dfrac{1}{2}"),
    (r"1\frac{1}{2}", "3/2"),
    ("50%", r"50\%"),
    ("50", r"50\%"),
    ("90", r"90^\circ"),
    (r"3\sqrt{13}", r"\sqrt{117}"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    ("1.6e-19", r"1.6 \times 10^{-19}"),
    ("6-5i", "-5i + 6"),
    ("x^2+x", "x(x+1)"),
    ("x=5", "5"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"\{1, 2\}", r"\{2,1\}"),
    (r"\{1,2\} \cup \{3\}", r"\{1,2,3\}"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"\begin{pmatrix} 1 \\ 0.5 \end{pmatrix}", r"\begin{pmatrix} 1 \\ \frac12 \end{pmatrix}"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "C"),
]
DIFFERENT = [
    ("18", "19"),
    ("-5", "5"),
    ("12345678901234567890", "12345678901234567891"),
    ("0.3333", "1/3"),
    ("5x", "5"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "[1,2]"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    (r"x \leq 5", r"x \geq 5"),
    ("1.325e-27", "2.88e-19"),
    (r"\frac{1}{10^{8}}", r"\frac{2}{10^{8}}"),
    ("x^2", "x^3"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
]


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_the_same_answer_written_in_another_way(answer: str, reference: str):
    assert grade(rf"So it is $\boxed{{{answer}}}$.", reference).right


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_another_answer(answer: str, reference: str):
    assert not grade(rf"So it is $\boxed{{{answer}}}$.", reference).right


def test_a_tolerance_is_relative_and_for_numbers_only():
    assert grade(r"\boxed{41.9}", "41.8", tolerance=0.01).right
    assert not grade(r"\boxed{41.9}", "41.8").right
    assert not grade(r"\boxed{42.5}", "41.8", tolerance=0.01).right
    assert grade(r"\boxed{4.52e33}", "4.5e33", tolerance=0.01).right
    assert not grade(r"\boxed{0.0001}", "0", tolerance=0.01).right


@pytest.mark.parametrize(
    "text", ["9^{9^{9^{9}}}", "9" * 5000, "(" * 300, r"\frac{1}{0}", "{" * 30 + "}" * 30, "100000!"]
)
def test_hostile_answers_are_wrong_and_interrupted(text: str, monkeypatch: pytest.MonkeyPatch):
    """The first one would never end."""
    monkeypatch.setattr(benchmarks, "_TIMEOUT_S", 1)
    assert not grade(rf"\boxed{{{text}}}", "18").right


@given(st.text(max_size=40))
def test_any_text_can_be_graded(text: str):
    assert grade(text, "18").extracted is None or isinstance(grade(text, "18").extracted, str)
    grade(text, "A", 10)


# data


def options_of(data: Path | str, names: str, **more: Any) -> Questions:
    return Questions(tasks=tuple(names.split(",")), data=str(data), **more)


def docs(data: Path | str, names: str, **more: Any) -> dict[str, list[Row]]:
    return {task.name: list(task.written.eval_docs) for task in load_tasks(options_of(data, names, **more))}


def test_files_of_every_shape(tmp_path: Path):
    write(tmp_path / "gsm8k_test.jsonl", {"question": "q", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"}, WRITTEN)
    write(tmp_path / "math500.jsonl", {"unique_id": "a/1.json", "problem": "p", "answer": "\\frac{1}{2}", "level": 2})
    write(tmp_path / "amc23.jsonl.gz", {"id": 0, "question": "q", "answer": 27.0})
    write(tmp_path / "minerva_math.jsonl", WRITTEN | {"subject": "Astronomy"})
    write(tmp_path / "mmlu.jsonl.gz", CHOICE, {"question": "q", "choices": ["x", 3], "answer": 0, "subject": "s"})
    write(
        tmp_path / "mmlu_pro.jsonl",
        {"question_id": 70, "question": "q", "options": list("abcdefghij"), "answer": "J", "answer_index": 9},
    )
    found = docs(tmp_path, "gsm8k,math500,amc23,minerva,mmlu,mmlu_pro")
    assert [(one["id"], one["answer"]) for one in found["gsm8k"]] == [
        (f"{tmp_path}/gsm8k_test.jsonl:1", "1,005"),
        ("w-0", "5"),
    ]
    assert found["math500"] == [
        {"id": "a/1.json", "question": "p", "answer": "\\frac{1}{2}", "choices": [], "subject": "", "tolerance": 0.0}
    ]
    assert (found["amc23"][0]["id"], found["amc23"][0]["answer"]) == ("0", "27.0")
    assert grade("The answer is 27", "27.0").right
    assert (found["minerva"][0]["subject"], found["minerva"][0]["tolerance"]) == ("Astronomy", 0.01)
    assert (found["mmlu"][0]["answer"], found["mmlu"][0]["choices"]) == ("B", ["b", "a", "c"])
    assert (found["mmlu"][1]["answer"], found["mmlu"][1]["choices"]) == ("A", ["x", "3"])
    [pro] = found["mmlu_pro"]
    assert (pro["id"], pro["answer"], len(pro["choices"])) == ("70", "J", 10)


def test_gpqa_comes_from_the_file_that_its_authors_give_out(tmp_path: Path):
    file = tmp_path / "gpqa_diamond.csv"
    file.write_text(
        "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Subdomain\n"
        'r1,"Which, of these?",right,one,"two\nlines",three,Physics\n'
        "r2,And now?,yes,no,maybe,never,Chemistry\n"
    )
    found = docs(tmp_path, "gpqa")["gpqa"]
    assert docs("", f"gpqa={file}")["gpqa"] == found
    for one, right in zip(found, ("right", "yes"), strict=True):
        assert one["choices"]["ABCD".index(one["answer"])] == right
        assert len(set(one["choices"])) == 4
    assert (found[0]["subject"], found[0]["id"]) == ("Physics", "r1")
    rows = [
        {"Question": f"q{i}", "Correct Answer": "r", **{f"Incorrect Answer {n}": str(n) for n in (1, 2, 3)}}
        for i in range(40)
    ]
    write(tmp_path / "many.jsonl", *rows)
    assert {one["answer"] for one in docs("", f"gpqa={tmp_path / 'many.jsonl'}")["gpqa"]} == set("ABCD")


def test_a_limit_takes_questions_from_all_over_the_file(tmp_path: Path):
    write(tmp_path / "gsm8k.jsonl", *[{"id": i, "question": "q", "answer": "1"} for i in range(10)])

    def ids(limit: int) -> list[str]:
        return [one["id"] for one in docs(tmp_path, "gsm8k", limit=limit)["gsm8k"]]

    assert ids(4) == ["0", "2", "5", "7"]
    assert ids(0) == ids(10) == ids(99) == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("gsm8k", b'{"question": "q", "answer": "5"}\n{', ":2: malformed JSON"),
        ("gsm8k", b"[1]", ":1: a row must be an object, got [1]"),
        ("gsm8k", b'\n\n{"answer": "5"}', ":3: a row must have text in question/problem/Question and answer/"),
        ("gsm8k", b'{"question": "q"}', ":1: a row must have text in"),
        ("gsm8k", b'{"question": "q", "answer": null}', ":1: a row must have text in"),
        ("gsm8k", b'{"question": " ", "answer": "5"}', ":1: a row must have text in"),
        ("gsm8k", b'{"question": "q", "answer": "5 ####"}', ":1: a row must have text in"),
        ("gsm8k", b'{"question": "\xff", "answer": "5"}', ":1: not UTF-8"),
        (
            "gsm8k",
            b'{"question": "q", "choices": ["a", "b"], "answer": "A"}',
            ":1: gsm8k takes questions without choices",
        ),
        ("mmlu", b'{"question": "q", "answer": "5"}', ":1: mmlu takes questions with choices"),
        ("mmlu", b'{"question": "q", "choices": ["a"], "answer": "A"}', ":1: choices must be a list of 2 to 10"),
        ("mmlu", b'{"question": "q", "choices": "ab", "answer": "A"}', ":1: choices must be a list of 2 to 10"),
        ("mmlu", b'{"question": "q", "choices": ["a", []], "answer": "A"}', ":1: choices must be a list of 2 to 10"),
        ("mmlu", b'{"question": "q", "choices": ["a", "b"], "answer": "C"}', ":1: answer must be a letter of AB"),
        ("mmlu", b'{"question": "q", "choices": ["a", "b"], "answer": 2}', ":1: answer must be a letter of AB"),
        ("mmlu", b'{"question": "q", "choices": ["a", "b"]}', ":1: answer must be a letter of AB"),
        (
            "mmlu",
            b'{"question": "q", "choices": ["a", "b"], "answer": "A", "answer_index": 1}',
            ":1: answer must be a letter of AB or its index, got 'A' and 'B'",
        ),
    ],
)
def test_a_malformed_file_is_named_with_its_line(task: str, content: bytes, message: str, tmp_path: Path):
    file = tmp_path / f"{task}.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tasks(options_of(tmp_path, task))
    assert f"{file}{message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_malformed_and_empty_files_of_other_kinds_are_named_too(tmp_path: Path):
    (tmp_path / "gpqa.csv").write_bytes(b"Question,Correct Answer\nq,r\n")
    with pytest.raises(UserError, match=r"gpqa.csv:2: choices must be a list"):
        load_tasks(options_of(tmp_path, "gpqa"))
    (tmp_path / "gpqa.csv").write_bytes(b'Question,Correct Answer\n"q" x,r\n')
    with pytest.raises(UserError, match=r"gpqa.csv cannot be read \(Error: "):
        load_tasks(options_of(tmp_path, "gpqa"))
    (tmp_path / "mmlu.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"mmlu.jsonl.gz:1: broken or truncated gzip"):
        load_tasks(options_of(tmp_path, "mmlu"))
    (tmp_path / "gsm8k.jsonl").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"questions.tasks = 'gsm8k': .* holds no question"):
        load_tasks(options_of(tmp_path, "gsm8k"))


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        ("gsm8k", "nothing", "questions.data or questions.tasks, for 'gsm8k': nothing: no such file or folder"),
        ("gsm8k", ".", "questions.tasks = 'gsm8k': no file gsm8k or gsm8k_test (.jsonl, .jsonl.gz, .csv) in ."),
        ("gsm8k=some.txt", "", "questions.tasks = 'gsm8k': some.txt: must be one of .jsonl, .jsonl.gz, .csv"),
    ],
)
def test_a_task_without_its_file_says_what_to_do(
    names: str, data: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.txt").write_text("x")
    with pytest.raises(UserError) as error:
        load_tasks(options_of(data, names))
    assert str(error.value).startswith(message)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"^questions.tasks = 'aime25': math-ai/aime25 cannot be read .*questions.data"):
        load_tasks(options_of("", "aime25"))


def test_the_tasks_are_those_of_the_option_of_the_files_and_of_the_page(tmp_path: Path):
    names = (*MATH, *SCIENCE)
    assert load(None, ["--questions.tasks", ",".join(names)]).questions.tasks == names
    assert set(load().questions.tasks) == set(names) - {"gpqa"}
    for name in names:
        write(tmp_path / f"{name}.jsonl", CHOICE if name in SCIENCE else WRITTEN)
    tasks = load_tasks(options_of(tmp_path, ",".join(names)))
    assert [task.name for task in tasks] == list(names)
    hub = {task.written.config.dataset_kwargs["hub"][0] for task in tasks}
    assert set(names) | hub <= backticked("docs/questions.md")
    assert all((task.letters is None) == (task.cloze is None) == (task.name in MATH) for task in tasks)


# prompts


def contexts(data: Path, names: str, shots: int) -> list[dict[str, str]]:
    """The first prompt of each task, by its kind."""
    found = []
    for task in load_tasks(options_of(data, names, shots=shots)):
        kinds = {"written": task.written, "letters": task.letters, "cloze": task.cloze}
        for one in filter(None, kinds.values()):
            one.build_all_requests()
        found.append({kind: one.instances[0].args[0] for kind, one in kinds.items() if one})
    return found


def test_every_worked_example_answers_itself(tmp_path: Path):
    names = (*MATH, "mmlu")
    for name in names:
        write(tmp_path / f"{name}.jsonl", CHOICE if name == "mmlu" else WRITTEN)
    tasks = {task.name: task.written for task in load_tasks(options_of(tmp_path, ",".join(names)))}
    for name in MATH:
        samples = tasks[name].fewshot_cfg.samples
        assert len(samples) == (8 if name == "gsm8k" else 4)
        for one in samples:
            number = one["answer"].removeprefix("$\\boxed{").removesuffix("}$")
            assert grade(f"{one['steps']} The answer is {one['answer']}.", number).right
    assert {one["answer"] for one in tasks["mmlu"].fewshot_cfg.samples} == set("ABCD")


def test_prompts_to_the_letter(tmp_path: Path):
    for name in ("gsm8k", "math500", "minerva"):
        write(tmp_path / f"{name}.jsonl", WRITTEN)
    write(tmp_path / "mmlu_pro.jsonl", {"question": "Which?", "answer": "B", "choices": ["x", "y"]})
    names = "gsm8k,math500,minerva,mmlu_pro"
    assert contexts(tmp_path, names, 0) == [
        *[{"written": "Question: What is 2 + 3?\nAnswer:"}] * 3,
        {
            "written": "Question: Which?\nA. x\nB. y\nAnswer:",
            "letters": "Question: Which?\nA. x\nB. y\nAnswer:",
            "cloze": "Question: Which?\nAnswer:",
        },
    ]
    gsm8k, contest, minerva, choice = contexts(tmp_path, names, 1)
    assert gsm8k["written"] == (
        "Question: A baker fills 6 trays with 12 rolls each and sells 50 rolls. How many rolls are left?\n"
        "Answer: The trays hold 6 * 12 = 72 rolls. After the sale 72 - 50 = 22 rolls are left. The answer is 22.\n\n"
        "Question: What is 2 + 3?\nAnswer:"
    )
    assert contest["written"] == (
        "Question: If $3x - 7 = 11$, what is $x^2$?\nAnswer: Then $3x = 18$, so $x = 6$ and $x^2 = 36$. "
        "The answer is $\\boxed{36}$.\n\nQuestion: What is 2 + 3?\nAnswer:"
    )
    assert minerva["written"].startswith("Question: A cart of mass 2 kg moves at 3 m/s.")
    particle = "Question: Which of these particles carries a negative charge?\n"
    lettered = "A. the proton\nB. the neutron\nC. the electron\nD. the photon\nAnswer: C\n\n"
    assert choice["written"] == choice["letters"] == f"{particle}{lettered}Question: Which?\nA. x\nB. y\nAnswer:"
    assert choice["cloze"] == f"{particle}Answer: the electron\n\nQuestion: Which?\nAnswer:"
    assert contexts(tmp_path, "gsm8k", 99)[0]["written"].count("Question:") == 9


def test_worked_examples_by_subject_are_found_beside_the_file(tmp_path: Path):
    write(tmp_path / "mmlu.jsonl", CHOICE)
    assert "negative charge" in contexts(tmp_path, "mmlu", 1)[0]["written"]
    dev = CHOICE | {"id": "dev", "question": "Which is b?", "answer": "A"}
    write(tmp_path / "mmlu_dev.jsonl", dev | {"subject": "other", "question": "no"}, dev)
    wanted = "Question: Which is b?\nA. b\nB. a\nC. c\nAnswer: A\n\nQuestion: Which is a?\nA. b\nB. a\nC. c\nAnswer:"
    [found] = contexts(tmp_path, "mmlu", 4)
    assert found["written"] == found["letters"] == wanted
    assert found["cloze"] == "Question: Which is b?\nAnswer: b\n\nQuestion: Which is a?\nAnswer:"


# whole measurements


def folder_of_tasks(tmp_path: Path) -> Path:
    """Two tasks in words that the embedded tokenizer knows."""
    folder = tmp_path / "tasks"
    folder.mkdir(exist_ok=True)
    rows = [{"id": str(i), "question": f"ball {i} . swap {i} {i + 1}", "answer": str(i)} for i in range(4)]
    write(folder / "gsm8k.jsonl", *rows)
    write(folder / "mmlu.jsonl", *[row | {"choices": ["1 ;", "2 ;", "ball"], "answer": "B"} for row in rows])
    return folder


def measure(tmp_path: Path, progress: Any = None, **changes: Any) -> list[Row]:
    chosen = {"tasks": ["gsm8k", "mmlu"], "data": str(folder_of_tasks(tmp_path))}
    chosen |= {"shots": 0, "samples": 2, "max_tokens": 6}
    config = from_dict(options(tmp_path, "run", **merge({"questions": chosen}, changes)))
    return benchmarks.prepare(config, load_tasks(config.questions), progress)("model")


def test_a_measurement_is_the_same_in_every_batch_and_counts_its_work(tmp_path: Path):
    told: list[tuple[int, int]] = []
    whole = measure(tmp_path, lambda done, total: told.append((done, total)))
    assert whole == measure(tmp_path, questions={"batch": 3})
    assert whole != measure(tmp_path, seed=1)
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert [(one["task"], one["mode"]) for one in whole[::4]] == [
        ("gsm8k", "nothink"),
        ("gsm8k", "think"),
        ("mmlu", "nothink"),
        ("mmlu", "think"),
    ]
    assert [[answer["sample"] for answer in one["answers"]] for one in whole] == [[0, 1, 2]] * 16
    assert set(whole[8]["picks"]) == {"loglik_letter", "loglik_plain", "loglik_normalised"}
    assert set(whole[-1]["picks"]) == {"loglik_letter"}
    assert measure(tmp_path, questions={"tasks": ["mmlu"]}) == whole[8:]


def test_samples_are_drawn_each_on_its_own(tmp_path: Path):
    def texts(row: Row, field: str) -> list[str]:
        return [answer[field] for answer in row["answers"]]

    for one in measure(tmp_path, questions={"max_tokens": 10}):
        assert len(set(texts(one, "text"))) == 3, "greedy, and two samples"
        assert (len(set(texts(one, "thought"))) > 1) == (one["mode"] == "think")


@pytest.mark.parametrize("close", ["</think>", "learned"])
@torch.no_grad()
def test_thinking_reads_the_same_prompt_and_the_thought_before_it_answers(tmp_path: Path, close: str):
    """Greedy thought and answer, made again by plain one-row forwards; once with thoughts that close themselves."""
    from forethought.data.positions import thought_format

    chosen = {"samples": 0, "thinking": "with"}
    if close == "learned":
        close = measure(tmp_path, questions=chosen)[0]["answers"][0]["thought"].split()[-1]
    config = from_dict(options(tmp_path, "run", method={"close": close}))
    tokenizer, model = load_tokenizer(config.model), load_model(config.model, config.seed)
    form, seen = thought_format(tokenizer, config.method), set()
    for one in measure(tmp_path, questions=chosen, method={"close": close}):
        [answer] = one["answers"]
        tokens = form.prompt_tokens(tokenizer(one["prompt"])["input_ids"])
        thought: list[int] = []
        while len(thought) < config.method.thought_length and thought[-1:] != list(form.close):
            logits = model(input_ids=torch.tensor([tokens + thought])).logits[0, -1]
            if not thought:
                logits[form.close[0]] = -torch.inf
            thought.append(int(logits.argmax()))
        closed = thought[-1:] == list(form.close)
        seen.add(closed)
        assert (answer["closed"], answer["thought_length"]) == (closed, len(thought))
        assert answer["thought"] == tokenizer.decode(thought[:-1] if closed else thought)
        tokens = tokens + thought + ([] if closed else list(form.close))
        text: list[int] = []
        while len(text) < 6 and text[-1:] != [tokenizer.eos_token_id]:
            text.append(int(model(input_ids=torch.tensor([tokens + text])).logits[0, -1].argmax()))
        assert answer["text"] == tokenizer.decode(text, skip_special_tokens=True)
        assert answer["cut_off"] == (text[-1] != tokenizer.eos_token_id)
        if one["picks"]:
            letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in "ABC"]
            scores = [float(plain_targets(model, tokens, letter).sum()) for letter in letters]
            assert one["picks"]["loglik_letter"] == "ABC"[scores.index(max(scores))]
    assert close == "</think>" or True in seen


@torch.no_grad()
def test_choices_are_picked_as_a_naive_computation_picks_them(tmp_path: Path):
    config = from_dict(options(tmp_path, "run"))
    tokenizer, model = load_tokenizer(config.model), load_model(config.model, config.seed)
    rows = measure(tmp_path, questions={"tasks": ["mmlu"], "samples": 0, "thinking": "without"})
    for one in rows:
        question = one["prompt"].split("\n")[0]
        context = tokenizer(f"{question}\nAnswer:")["input_ids"]
        choices = {"A": "1 ;", "B": "2 ;", "C": "ball"}
        logp = {
            letter: float(
                plain_targets(model, context, tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]).sum()
            )
            for letter, choice in choices.items()
        }
        assert one["picks"]["loglik_plain"] == max(logp, key=lambda letter: logp[letter])
        assert one["picks"]["loglik_normalised"] == max(logp, key=lambda letter: logp[letter] / len(choices[letter]))


def test_prompts_without_room_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"^questions.shots = 0: a prompt of gsm8k has .* lower questions.shots"):
        measure(tmp_path, questions={"max_tokens": 250})


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


def test_a_model_leaves_figures_and_every_answer(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(command(model, folder_of_tasks(tmp_path))) == 0
    out = capsys.readouterr().out
    for word in ("gsm8k: 4 asked", "mmlu: 4 asked", "pass@1", "most likely letter", "no thought", "overall average"):
        assert word in out
    folder = tmp_path / "runs" / "questions-model"
    figures = json.loads((folder / "questions.json").read_text())
    assert figures["checker"] == benchmarks.checker()
    assert figures["version/gsm8k"] == "3"
    names = {name.removesuffix("/se").split("/")[-1] for name in figures if name.split("/")[0] != "version"}
    assert names <= backticked("docs/metrics.md")
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 4
    for mode in ("nothink", "think"):
        right = [row["answers"][0]["right"] for row in rows if (row["task"], row["mode"]) == ("gsm8k", mode)]
        assert figures[f"model/{mode}/gsm8k/greedy"] == sum(right) / 4
    assert rows[0]["prompt"] == "Question: ball 0 . swap 0 1\nAnswer:"
    assert {"thought", "text", "extracted", "right", "length", "cut_off"} <= set(rows[0]["answers"][0])
    assert main(command(model, folder_of_tasks(tmp_path))) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    chosen = {"data": str(folder_of_tasks(tmp_path)), "tasks": ["gsm8k"], "shots": 0, "samples": 0, "max_tokens": 4}
    again, file = run_benchmarks(model, {"questions": chosen, "method": {"thought_length": 4}, "run": "other"})
    assert file == Path("other/questions.json")
    assert again["model/nothink/gsm8k/answer_length"] > 0
    other = [json.loads(line) for line in Path("other/questions.jsonl").read_text().splitlines()]
    assert [row["answers"] for row in other[:4]] == [row["answers"][:1] for row in rows[:4]]
    assert forethought.run_benchmarks is run_benchmarks


def test_a_run_is_shown_beside_its_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(from_dict(options(tmp_path, "run", train={"steps": 2})))
    assert main(command(tmp_path / "run", folder_of_tasks(tmp_path))) == 0
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
        (
            ["embedded", "--questions.tasks", "gsm8k=g.jsonl,gsm8k=b.jsonl"],
            "questions.tasks = 'gsm8k=g.jsonl,gsm8k=b.jsonl': names a task twice",
        ),
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
