import contextlib
import json
import math
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from forethought.cli import main
from forethought.config import UserError
from forethought.html import visible
from forethought.run.folder import RunLog
from forethought.tools import report
from forethought.tools.report import plots, viewer, write, write_comparison
from forethought.tools.report import runs as run_folders
from forethought.tools.report.tables import duration, evaluations, figure, signed
from helpers.pages import Page, make_run


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    run = make_run(tmp_path_factory.mktemp("report") / "cups")
    assert write([run]) == run / "report.html"
    return run


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    runs = [
        make_run(folder / "rlp"),
        make_run(folder / "_$a$ <i>木\\1\x01", seed=1, steps=40, evaluated=False),
        make_run(folder / "cpt", "cpt", seed=2, steps=300),
    ]
    return write(runs)


def read(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def small(tmp_path: Path, **files: str) -> Path:
    """A run with one logged step and two plots, some of its files replaced."""
    run = make_run(tmp_path / "small", steps=1, evaluated=False)
    logged = '{"step": 1, "rollout/length": 3, "optim/gradient_norm": 1.5}\n'
    for name, content in ({"metrics": logged} | files).items():
        suffix = "json" if name in ("config", "summary") else "jsonl"
        (run / f"{name}.{suffix}").write_text(content)
    return run


def test_page_says_what_the_run_was_and_what_it_brought(one):
    text = read(one).text
    for phrase in ("embedded", "world:cups/train", "12 min 5 s", "32 positions with 8 thoughts each", "RLP"):
        assert phrase in text
    assert "Accuracy, thinking" in text
    assert "24.0 % to 36.0 %" in text
    assert "+30.0 points ✓ better" in text
    assert "Positions marked answer" in text
    assert "method.clip_low" in text


def test_page_has_each_plot_with_its_explanation_and_keeps_it_as_svg(one):
    page = read(one)
    drawn = [plot for plot in plots.PLOTS if not plot.next_token and plot.name not in ("kl", "leakage", "match")]
    assert sorted(path.stem for path in (one / "plots").iterdir()) == sorted(plot.name for plot in drawn)
    assert all(plot.explanation in page.text for plot in drawn)
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == len(drawn)


def test_thoughts_of_first_middle_and_last_step_come_sorted_by_reward(one):
    run = run_folders.load(one, "cups")
    assert [position.step for position in run.positions] == [1, 1, 40, 40, 80, 80]
    rewards = [thought.reward for thought in run.positions[0].thoughts]
    assert rewards == sorted(rewards, reverse=True)
    html = (one / "report.html").read_text()
    best = run.positions[0].thoughts[0]
    assert html.index(f"advantage {signed(best.advantage)}") < html.index(f"reward {signed(rewards[-1])}")
    assert re.search(r'class="thought up" style="--strength: 1\.00"', html)
    text = read(one).text
    assert "␣black has log p −1.609 nats, a probability of 20.0 %" in text
    assert "The log-probability without a thought was not measured here." in text
    assert "✂ truncated" in text


def test_corpus_text_is_shown_and_never_obeyed(one):
    page = read(one)
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"img", "b", "iframe", "link", "object"})
    assert '<script>alert("x")</script> <b>bold</b> & "quoted"' in page.text
    assert "⟨U+0000⟩⟨U+001B⟩[31m ⟨U+202E⟩" in page.text
    html = (one / "report.html").read_text()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)


def test_page_loads_nothing(one, three):
    for path in (one / "report.html", three):
        html = path.read_text(encoding="utf-8")
        attributes = [(name, value) for _, attrs in Page(html).tags for name, value in attrs.items()]
        links = [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
        assert links
        assert all(value and value.startswith("#") for value in links)
        assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", html))
        assert "@import" not in html
        assert "http-equiv" in html
        assert "default-src 'none'" in html


def test_page_is_sound_html(one, three):
    for path in (one / "report.html", three):
        tags = Page(path.read_text(encoding="utf-8")).tags
        ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        used = {attrs[name] for _, attrs in tags for name in ("href", "xlink:href") if name in attrs}
        assert {f"#{name}" for name in ids} >= used
        assert ("html", {"lang": "en"}) in tags
        assert all("aria-label" in attrs for tag, attrs in tags if tag == "svg")


def test_plots_take_the_colours_of_the_page_and_stand_alone_on_white(one):
    html = (one / "report.html").read_text()
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]*)", drawn)) == {
        "none", "currentColor", "var(--grid)", "var(--series-0)", "var(--series-1)"
    }  # fmt: skip
    assert "<style" not in drawn
    kept = (one / "plots" / "gain.svg").read_text()
    assert f"fill: {plots.PAPER}" in kept
    assert f"stroke: {plots.COLORS[0]}" in kept
    assert "http://purl.org" not in kept


def test_several_runs_share_plots_tables_and_colours(three):
    html = three.read_text(encoding="utf-8")
    page = Page(html)
    assert three.name == "report.html"
    assert (three.parent / "report-plots" / "gain.svg").is_file()
    assert not (three.parent / "rlp" / "report.html").exists()
    shown = "_$a$ <i>木\\1⟨U+0001⟩"
    assert "3 runs compared" in page.text
    step_time, accuracy = (
        Page(re.search(rf'<svg[^>]*aria-label="{title}.*?</svg>', html, flags=re.DOTALL).group()).text
        for title in ("Step time", "Next-token accuracy")
    )
    assert all(name in step_time for name in ("rlp", shown, "cpt"))
    assert "cpt" in accuracy
    assert shown not in accuracy
    assert "var(--series-2)" in html
    kept = three.parent / "report-plots"
    assert "opacity: 0.2" in (kept / "accuracy.svg").read_text(), "300 points are drawn as a band"
    assert "opacity: 0.2" not in (kept / "gain.svg").read_text()
    assert "seed ≠ differs" in page.text
    assert f"{shown} is not finished: it was stopped, or it failed." in page.text
    assert "40 of 80, not finished" in page.text
    assert "This method samples no thoughts." in page.text


def test_out_names_another_page(tmp_path):
    run, out = small(tmp_path), tmp_path / "new" / "page.html"
    assert write([run], out) == out
    assert "small" in Page(out.read_text()).text
    assert (run / "plots" / "length.svg").is_file()
    assert not (run / "report.html").exists()


def test_a_full_disk_leaves_the_old_page_and_plots(tmp_path):
    run = small(tmp_path)
    write([run])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, min(map(len, before.values())) + 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(UserError, match=r"cannot write .*File too large"):
                write([run])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_same_runs_give_the_same_bytes(one, tmp_path):
    again = make_run(tmp_path / "cups")
    write([again])
    for path in [one / "report.html", *(one / "plots").iterdir()]:
        assert (again / path.relative_to(one)).read_bytes() == path.read_bytes(), path.name


def test_missing_pieces_leave_a_sentence(tmp_path):
    run = small(tmp_path)
    (run / "thoughts.jsonl").unlink()
    write([run])
    assert "There is no evaluation" in read(run).text
    assert "No thoughts have been logged yet." in read(run).text
    (run / "metrics.jsonl").unlink()
    (run / "summary.json").write_text("{}")
    write([run])
    assert "No metrics have been logged yet." in read(run).text


def test_odd_numbers_do_not_stop_the_report(tmp_path):
    thought = {"text": "\ud800", "length": None, "closed": False, "reward": None, "advantage": math.nan}
    row = {"step": 1, "context": "", "target": "\n", "nothink": -math.inf, "thoughts": [thought] * 20}
    run = small(
        tmp_path,
        config='{"version": 0, "run": 1, "method": 3, "train": []}',
        metrics='{"step": 1, "reward/gain": NaN, "rollout/length": 3, "objective/loss": "x", "optim/gradient_norm": 1}',
        thoughts=json.dumps(row),
        summary=json.dumps({"before/all/closed": None, "after/all/closed": 0.5, "after/all/new": math.inf}),
    )
    write([run])
    assert {path.stem for path in (run / "plots").iterdir()} == {"length", "gradient-norm"}
    text = read(run).text
    assert "⟨U+D800⟩" in text
    assert "12 more thoughts with smaller rewards" in text


def test_line_cut_by_a_killed_run_is_left_out(tmp_path):
    run = small(tmp_path)
    for name in ("metrics", "thoughts"):
        with (run / f"{name}.jsonl").open("ab") as file:
            file.write('{"step": 2, "context": "é'.encode()[:-1])
    loaded = run_folders.load(run, "small")
    assert [row["step"] for row in loaded.metrics] == [1]
    assert {position.step for position in loaded.positions} == {1}


def test_step_logged_again_after_a_resume_counts_once(tmp_path):
    run = small(tmp_path, metrics='{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 2, "a": 3}\n{"step": 3}\n')
    assert run_folders.load(run, "small").series("a") == ([1, 2], [1.0, 3.0])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metrics": '{"step": 1}\n{"step": 2, "rew\n{"step": 3}\n'}, r"metrics\.jsonl:2: malformed JSON"),
        ({"metrics": '{"step": 1}\n{"reward/gain": 2}\n'}, r"metrics\.jsonl:2: unexpected content: KeyError 'step'"),
        ({"metrics": '{"step": Infinity}\n'}, r"metrics\.jsonl:1: unexpected content: OverflowError"),
        ({"metrics": "[1]\n"}, r"metrics\.jsonl:1: a row must be an object"),
        (
            {"thoughts": '{"step": 1, "context": "a", "target": "b", "thoughts": 5}'},
            r"thoughts\.jsonl:1: unexpected content",
        ),
        ({"config": "{"}, r"config\.json: is not valid JSON"),
        ({"summary": "[]"}, r"summary\.json: holds a list, not a JSON object"),
    ],
)
def test_broken_file_is_named(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        write([small(tmp_path, **files)])


def test_wrong_arguments_are_named_before_anything_is_drawn(tmp_path, one, monkeypatch):
    with pytest.raises(UserError, match="at least one run"):
        write([])
    with pytest.raises(UserError, match=r"not a run folder: it has no config\.json"):
        write([tmp_path])
    with pytest.raises(UserError, match="cups' is given twice"):
        write([one, one / ".." / "cups"])
    run = small(tmp_path)
    for runs, out in ((run,), tmp_path), ((run, one), "."), ((run, one), "/"):
        with pytest.raises(UserError, match=r"cannot write .*: is a folder; name a file"):
            write(runs, out)
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"cannot write .*: the folder cannot"),
    ):
        patch.setattr("os.access", lambda *_: False)
        write([run])
    assert not (run / "plots").exists()


def test_report_needs_neither_torch_nor_pyplot(tmp_path):
    run = small(tmp_path)
    script = (
        "import sys, pathlib, forethought.tools.report\n"
        f"forethought.tools.report.write([pathlib.Path({str(run)!r})])\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_a_method_and_metrics_from_outside_the_package_are_shown(tmp_path):
    run = small(tmp_path, metrics='{"step": 1, "my/metric": 2.5, "rollout/length": 3, "objective/loss": 1}\n')
    config = json.loads((run / "config.json").read_text())
    config["method"] |= {"name": "mine:Method", "reward": "mine:reward", "position_policy": "mine:policy"}
    config["rollout"]["engine"] = "mine:engine"
    (run / "config.json").write_text(json.dumps(config))
    (run / "summary.json").write_text(json.dumps({"before/all/mine": 0.5, "after/all/mine": 0.75}))
    write([run])
    text = read(run).text
    assert "mine:Method, with the reward mine:reward" in text
    assert "32 positions with 8 thoughts each" in text
    assert "Mine" in text
    assert {path.stem for path in (run / "plots").iterdir()} == {"my-metric", "length", "loss"}
    (run / "metrics.jsonl").write_text('{"step": 1, "objective/loss": 1, "objective/accuracy": 0.5}\n')
    (run / "thoughts.jsonl").unlink()
    write([run])
    assert "32 windows of text" in read(run).text
    assert "This method samples no thoughts." in read(run).text


def test_metrics_of_similar_names_have_plots_and_ids_of_their_own(tmp_path):
    run = small(tmp_path, metrics='{"step": 1, "a/b": 1, "a-b": 2, "a.b": 3, "a_b": 4, "gain": 5}\n')
    write([run])
    texts = [path.read_text() for path in (run / "plots").iterdir()]
    assert len(texts) == len(set(texts)) == 5
    ids = re.findall(r' id="([^"]*)', (run / "report.html").read_text())
    assert len(ids) == len(set(ids)) > 5


def test_names_take_as_many_parents_as_needed():
    assert run_folders.names([Path("/a/b/run"), Path("/a/c/run")]) == ["b/run", "c/run"]
    assert run_folders.names([Path("/a/b/run"), Path("/a/c/other")]) == ["run", "other"]


def test_evaluation_calls_a_difference_only_where_intervals_part(one):
    [(name, rows), (other, _)] = evaluations([run_folders.load(one, "cups")])
    assert (name, other) == ("all", "answer")
    verdicts = {metric.name: cells[0].verdict for metric, cells in rows}
    assert [verdicts[name] for name in ("ce_think", "ce_nothink", "thought_length")] == ["better", "", ""]


def test_the_page_shows_the_gain_over_the_share_of_positions_that_think(one, tmp_path):
    """With 30 positions 5 % of them are 2, and the text gains 2 / 30 of what they gain on average."""
    assert "positions only" not in read(one).text
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    for when, gain in (("before", 0.5), ("after", 2.0)):
        summary[f"{when}/all/positions"] = 30
        for share in (5, 50, 100):
            name = f"{when}/all/gain_self_top_{share}"
            summary |= {name: gain, f"{name}/low": gain - 0.5, f"{name}/high": gain + 0.5}
    del summary["after/all/gain_self_top_50/low"]
    summary["after/answer/gain_self_top_100"] = 1.0  # one share makes no curve
    (run / "summary.json").write_text(json.dumps(summary))
    write([run])
    page = read(run)
    assert "Thinking at some positions only" in page.text and "top_50" not in page.text.split("Settings")[0]
    [drawing] = [
        attrs for tag, attrs in page.tags if tag == "svg" and "share of positions" in (attrs["aria-label"] or "")
    ]
    values = (drawing["aria-label"] or "").partition(". ")[2].split("; ")
    assert values[:4] == [
        "after training, 0 % 0, from 0 to 0",
        "after training, 6.67 % 0.1333, from 0.1 to 0.1667",
        "after training, 50 % 1, no interval",
        "after training, 100 % 2, from 1.5 to 2.5",
    ]
    assert values[6:] == ["before training, 50 % 0.25, from 0 to 0.5", "before training, 100 % 0.5, from 0 to 1"]
    others = write([run, one], tmp_path / "both.html").read_text()
    assert "run, after training, 50 %" in others and "cups, after training, 50 %" not in others


def test_a_comparison_shows_the_gain_of_each_arm_over_that_share(tmp_path):
    gains = {"base": (0.1, 0.2), "rlp": (4.0, 1.0)}
    rows = [
        {
            "arm": arm,
            "seed": "all",
            "metric": f"all/gain_self_top_{share}",
            "value": gain,
            "low": gain - 1,
            "high": gain,
        }
        for arm, both in gains.items()
        for share, gain in zip((25, 100), both, strict=True)
    ]
    rows += [{"arm": arm, "seed": "all", "metric": "all/positions", "value": 50} for arm in gains]
    described = {"name": "small", "model": "m", "corpus": "c", "held_out": "h", "sweeps": [], "claims": []}
    arms = {"rlp": {"options": {}, "budget": {}, "seeds": []}}
    (tmp_path / "experiment.json").write_text(json.dumps({**described, "arms": arms, "missing": {}}))
    (tmp_path / "compare.json").write_text(json.dumps(rows))
    page = Page(write_comparison(tmp_path).read_text())
    assert "Thinking at some positions only" in page.text and "gain of top" not in page.text.lower()
    [label] = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert label == (
        "all: gain per position of text over the share of positions that think. base, 0 % 0, from 0 to 0; "
        "base, 26 % 0.026, from -0.234 to 0.026; base, 100 % 0.2, from -0.8 to 0.2; rlp, 0 % 0, from 0 to 0; "
        "rlp, 26 % 1.04, from 0.78 to 1.04; rlp, 100 % 1, from 0 to 1"
    )


def test_running_mean_is_centred_and_shrinks_at_the_ends():
    assert plots.running_mean(np.array([1.0, 2.0, 6.0, 3.0])).tolist() == pytest.approx([1.5, 3.0, 11 / 3, 4.5])


def test_colour_strength_is_relative_to_the_group(one):
    position = run_folders.load(one, "cups").positions[0]
    largest = max(abs(thought.advantage) for thought in position.thoughts)
    assert report.strength(position, -largest / 2) == "0.50"
    assert report.strength(position, None) == "0"


def test_numbers_and_durations_as_text():
    assert (figure(0.1234), signed(0.1234)) == ("0.123", "+0.123")
    assert (figure(-0.1234), signed(-0.1234)) == ("−0.123", "−0.123")
    assert (figure(-0.0001), signed(0.0001)) == ("0.000", "0.000")
    assert (figure(0.5, "share"), signed(1234.56, "tokens")) == ("50.0\u00a0%", "+1,234.6")
    assert (figure(None), figure(math.inf), signed(None)) == ("–", "–", "–")
    seconds = (1.24, 45.0, 200.0, 7500.0, 273600.0)
    assert [duration(one) for one in seconds] == ["1.2 s", "45 s", "3 min 20 s", "2 h 5 min", "3 d 4 h"]


def test_invisible_characters_become_signs():
    assert visible("a\tb\x7f\u200b\u2028\ue000é木👩\u200d🔬") == "a⇥b⟨U+007F⟩⟨U+200B⟩⟨U+2028⟩⟨U+E000⟩é木👩\u200d🔬"
    assert visible("a\nb", kept="\n") == "a\nb"
    assert report.passage("<\n") == '&lt;<span class="sign">↵</span>\n'
    assert report.token(" a\n") == "␣a↵"


@pytest.mark.parametrize(
    "draw",
    [
        lambda points: plots.intervals(points, "gain", "nats"),
        lambda points: plots.costs(points, "gain", "nats", "FLOPs"),
        lambda points: plots.sweep(points, "gain", "nats", "method.group"),
    ],
    ids=["intervals", "costs", "sweep"],
)
def test_a_point_without_an_interval_is_hollow(draw: Callable[[list[plots.Point]], str]):
    exact = plots.Point(name="one", value=1.0, low=0.5, high=1.5)
    few = plots.Point(name="two", value=1.0, low=None, high=None)
    hollow = [draw(points).count("fill-opacity: 0;") for points in ([exact, exact], [exact, few], [few, few])]
    assert 0 == hollow[0] < hollow[1] < hollow[2]


class Clock:
    """Time that passes only where it is waited for; what happens meanwhile, by second."""

    def __init__(self, **events: Callable[[], object]):
        self.now, self.events, self.strftime = 0.0, events, time.strftime

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now / 100

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.events.get(f"at_{self.now:.0f}", lambda: None)()


def test_a_run_is_followed_from_its_first_step_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = small(tmp_path)
    logged, summary = (run / "metrics.jsonl").read_text(), make_run(tmp_path / "other", steps=1) / "summary.json"
    (run / "metrics.jsonl").unlink()
    with contextlib.ExitStack() as training:
        training.enter_context(RunLog(run).lock())
        clock = Clock(
            at_3=lambda: (run / "metrics.jsonl").write_text(logged),
            at_14=lambda: shutil.copy(summary, run),
            at_15=training.close,
        )
        monkeypatch.setattr(report, "time", clock)
        seen = []
        for page in report.follow([run]):
            html = page.read_text()
            seen.append((clock.now, "No metrics have been logged yet" in html, "This run is still running." in html))
            reloads = [attrs["data-reload"] for tag, attrs in Page(html).tags if "data-reload" in attrs]
            assert reloads == (["10"] if clock.now < 15 else [])
            assert ('http-equiv="refresh" content="10"' in html) == bool(reloads)
            follower = viewer.script("follow.js")
            allowed = [attrs["content"] for _, attrs in Page(html).tags if "script-src" in (attrs.get("content") or "")]
            assert (follower["source"] in allowed[0]) == (follower["text"] in html) == bool(reloads)
    assert seen == [(0, True, True), (10, False, True), (15, False, False)]
    assert sorted(path.name for path in run.glob(".*")) == [".lock"]


def test_ctrl_c_leaves_a_page_that_does_not_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = small(tmp_path)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "time", Clock(at_1=interrupt))
    with RunLog(run).lock():
        pages = report.follow([run])
        assert "data-reload" in next(pages).read_text()
        assert "data-reload" not in next(pages).read_text()
        assert next(pages, None) is None
    assert "still running" in read(run).text


def test_following_a_run_that_died_writes_its_page_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [str(small(tmp_path)), str(small(tmp_path / "done", summary='{"seed": 1}'))]
    assert main(["report", *runs, "--follow", "--out", str(tmp_path / "page.html")]) == 0
    first, *states = capsys.readouterr().out.splitlines()
    assert first.startswith(f"report: {tmp_path / 'page.html'}")
    assert states == [f"{runs[0]}: failed", f"{runs[1]}: finished"]
    text = Page((tmp_path / "page.html").read_text()).text
    assert text.count("is not finished: it was stopped, or it failed.") == 1
