"""Questions in an experiment: every arm is asked the same, once; means, errors and differences; the page."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forethought.config import UserError
from forethought.tools import benchmarks
from forethought.tools.experiment import arms, compare, questions
from forethought.tools.experiment.design import read

pytestmark = pytest.mark.filterwarnings("default")

ASKING = """
config = "quickstart"
seeds = [0, 1]
ask = true

[options]
corpus.window = 64
method = { group = 2, thought_length = 6, positions = 1 }
train = { steps = 1, batch = 4 }
evaluate = { documents = 4, positions = 1, view = 0 }
questions = { tasks = "gsm8k,mmlu", samples = 1, shots = 1, max_tokens = 3 }

[arms.rlp]

[[claims]]
arm = "rlp"
above = ["base"]
metrics = ["questions/think/overall/greedy"]
"""
WRITTEN = [{"question": f"ball {n} . swap {n} 5 . now ball", "answer": "5"} for n in (1, 2, 3)]
CHOSEN = [
    {"question": f"ball {n} . now ball", "answer": "B", "choices": ["4", str(n)], "subject": "cups"} for n in (1, 2)
]


def experiment(folder: Path, text: str = ASKING) -> Path:
    (folder / "asking.toml").write_text(text)
    for name, rows in (("gsm8k", WRITTEN), ("mmlu", CHOSEN)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "asking.toml"


def options(folder: Path, **questions: Any) -> dict[str, Any]:
    return {"run": str(folder / "run"), "questions": {"data": str(folder), **questions}}


@pytest.fixture(scope="module")
def extra() -> None:
    for package in ("lm_eval", "math_verify"):
        pytest.importorskip(package, reason="make test-lm-eval installs the extra eval")


@pytest.fixture(scope="module")
def finished(extra: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("asking")
    verdicts, _ = compare(experiment(folder), options(folder))
    return folder, verdicts


def rows(run: Path) -> dict[tuple[str, Any, str], dict[str, Any]]:
    return {(row["arm"], row["seed"], row["metric"]): row for row in json.loads((run / "compare.json").read_text())}


def test_the_base_and_every_seed_answer_the_same_prompts(finished: Any):
    folder, _ = finished
    lines = [
        [json.loads(line) for line in (folder / "run" / name / "questions.jsonl").read_text().splitlines()]
        for name in ("base", "rlp/seed-0", "rlp/seed-1")
    ]
    prompts = [[(row["mode"], row["task"], row["id"], row["prompt"]) for row in some] for some in lines]
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(prompts[0]) == 2 * (len(WRITTEN) + len(CHOSEN))


def test_rows_hold_answers_of_tasks_and_averages_with_errors(finished: Any):
    folder, verdicts = finished
    found = rows(folder / "run")
    for arm, seed in (("base", "all"), ("rlp", "all"), ("rlp", 0), ("rlp", 1)):
        for mode in ("nothink", "think"):
            for group in ("gsm8k", "mmlu", "math", "science", "overall"):
                for metric in ("greedy", "pass_at_1"):
                    row = found[arm, seed, f"questions/{mode}/{group}/{metric}"]
                    assert found[arm, seed, f"questions/{mode}/{group}/{metric}/se"]["value"] >= 0
                    assert row["low"] is row["high"] is None  # of three questions, and of two
            assert 0 <= found[arm, seed, f"questions/{mode}/gsm8k/extracted"]["value"] <= 1
    overall = [found["rlp", "all", f"questions/think/{group}/greedy"]["value"] for group in ("math", "science")]
    assert found["rlp", "all", "questions/think/overall/greedy"]["value"] == pytest.approx(sum(overall) / 2)
    difference = found["rlp", "all", "minus/base/questions/think/mmlu/loglik_letter"]["value"]
    both = [found[arm, "all", "questions/think/mmlu/loglik_letter"]["value"] for arm in ("rlp", "base")]
    assert difference == pytest.approx(both[0] - both[1])
    assert ("rlp", "all", "minus/base/questions/think/gsm8k/extracted") not in found
    assert [one.claim for one in verdicts] == ["rlp above base in questions/think/overall/greedy"]
    assert verdicts[0].holds is None


def test_the_page_shows_every_arm_beside_the_base(finished: Any):
    folder, _ = finished
    html = (folder / "run" / "compare.html").read_text()
    part = html[html.index('<section id="questions"') : html.index('<section id="seeds"')]
    for caption in ("math average", "science average", "overall average", "gsm8k: 3 questions", "mmlu: 2 questions"):
        assert f"<caption>{caption}</caption>" in part
    assert part.count('class="arm">base</th>') == part.count('class="arm">rlp</th>') == 5
    assert "to base</span>" in part
    assert "± " in part


def test_answers_of_an_older_checker_remain_where_it_graded_them_all(finished: Any):
    folder, _ = finished
    files = [folder / "run" / name / "answers.json" for name in ("base", "rlp/seed-0", "rlp/seed-1")]
    now = [file.read_text() for file in files]
    old = [text.replace(benchmarks.checker(), "plain") for text in now]
    for file, text in zip(files, old, strict=True):
        file.write_text(text)
    compare(experiment(folder), options(folder))
    assert [file.read_text() for file in files] == old
    files[0].write_text(now[0])
    compare(experiment(folder), options(folder))
    assert [file.read_text() for file in files] == now


def test_other_questions_are_asked_anew_and_nothing_is_trained_again(finished: Any):
    folder, _ = finished
    run = folder / "run"
    kept = [run / "rlp/seed-0" / name for name in ("summary.json", "records.json")] + [run / "base/records.json"]
    before = [path.stat().st_mtime_ns for path in kept]
    answers = (run / "rlp/seed-0/answers.json").stat().st_mtime_ns
    compare(experiment(folder), options(folder))
    assert (run / "rlp/seed-0/answers.json").stat().st_mtime_ns == answers
    compare(experiment(folder), options(folder, tasks="gsm8k", limit=2))
    assert [path.stat().st_mtime_ns for path in kept] == before
    found = rows(run)
    assert found["rlp", 0, "questions/think/gsm8k/questions"]["value"] == 2
    assert ("rlp", 0, "questions/think/mmlu/greedy") not in found
    compare(experiment(folder, ASKING.partition("[[claims]]")[0].replace("ask = true\n", "")), options(folder))
    assert not any("questions/" in metric for _, _, metric in rows(run))


def test_answers_to_other_questions_are_not_compared(extra: None, tmp_path: Path):
    file = experiment(tmp_path)
    compare(file, options(tmp_path))
    (tmp_path / "run/rlp/seed-1/answers.json").unlink()
    changed = [*WRITTEN[:-1], {**WRITTEN[-1], "answer": "6"}]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(UserError, match=r"^the questions of gsm8k, or its version, are not those answered in .*base/"):
        compare(file, options(tmp_path))
    experiment(tmp_path)
    compare(file, options(tmp_path))


def test_arms_cannot_have_questions_of_their_own_and_files_are_read_first(extra: None, tmp_path: Path):
    text = ASKING.replace("[arms.rlp]", "[arms.rlp]\noptions = { questions.limit = 1 }")
    with pytest.raises(UserError, match=r"arms.rlp: cannot set questions, which all arms share"):
        read(experiment(tmp_path, text), options(tmp_path))
    path = experiment(tmp_path)
    (tmp_path / "mmlu.jsonl").unlink()
    with pytest.raises(UserError, match="mmlu"):
        compare(path, options(tmp_path))
    assert not (tmp_path / "run").exists()


def test_means_over_seeds_and_their_errors_by_hand():
    seeds = [{("think", "gsm8k"): {"greedy": np.array(some)}} for some in ([1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0])]
    found = questions.pooled(seeds)
    assert found["think/gsm8k/greedy"] == pytest.approx(0.625)  # of 1, 0.5, 1, 0
    within = np.var([1, 0.5, 1, 0], ddof=1) / 4
    between = np.var([0.5, 0.75], ddof=1) / 2
    assert found["think/gsm8k/greedy/se"] == pytest.approx(np.sqrt(within + between))
    assert questions.pooled(seeds[:1])["think/gsm8k/greedy/se"] == pytest.approx(np.sqrt(1 / 3 / 4))
    over = questions.over(seeds, {("think", "gsm8k"): {"greedy": np.array([0.0, 0.0, 1.0, 0.0])}})
    assert over["think/gsm8k/greedy"] == pytest.approx(0.375)
    assert over["think/math/greedy"] == over["think/gsm8k/greedy"]


def test_few_questions_have_no_interval_and_none_right_has_wilsons_bound():
    def ends(right: list[float]) -> tuple[float | None, float | None]:
        found = questions.with_intervals(questions.pooled([{("think", "gsm8k"): {"greedy": np.array(right)}}]))
        return found.get("think/gsm8k/greedy/low"), found.get("think/gsm8k/greedy/high")

    assert ends([1.0, 0.0] * 4) == (None, None)
    bound = 1.96**2 / (18 + 1.96**2)
    assert ends([0.0] * 18) == pytest.approx((0.0, bound))
    assert ends([1.0] * 18) == pytest.approx((1 - bound, 1.0))
    low, high = ends([1.0, 0.0] * 9)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.5 / np.sqrt(17), 0.5 + 1.96 * 0.5 / np.sqrt(17)))


def test_a_meter_adds_up_what_comes_after_it(tmp_path: Path):
    began = time.process_time(), time.perf_counter()
    meter = arms.Meter()
    sum(n * n for n in range(300_000))
    meter.lap(tmp_path)
    first = json.loads((tmp_path / "spent.json").read_text())
    assert first["cpu_seconds"] <= time.process_time() - began[0] + 0.01
    assert first["seconds"] <= time.perf_counter() - began[1] + 0.01
    sum(n * n for n in range(300_000))
    meter.lap(tmp_path)
    second = json.loads((tmp_path / "spent.json").read_text())
    assert 0 < first["cpu_seconds"] < second["cpu_seconds"] < 2 * first["cpu_seconds"] + 60
    assert first["seconds"] < second["seconds"]
