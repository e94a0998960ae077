import json
import math
import re
from pathlib import Path

import pytest
import torch

import forethought
from forethought.config import UserError
from forethought.html import colored, limit, table
from forethought.inference import Gains, Prediction, ScoredToken, Thought
from helpers.pages import HOSTILE, Page, make_run

EVIL = HOSTILE.replace("\x00", "⟨U+0000⟩").replace("\x1b", "⟨U+001B⟩").replace("\u202e", "⟨U+202E⟩")


def assert_safe(html: str) -> str:
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "b", "script", "iframe"})
    assert re.sub(r"\s+", " ", EVIL) in page.text
    return page.text


def thought(text: str, closed: bool = True) -> Thought:
    return Thought(text=text, tokens=(1, 2), closed=closed)


def scored(at: int, text: str, logp: float, *thoughts: Thought) -> ScoredToken:
    return ScoredToken(at=at, token=7, text=text, logp=logp, nothink=-1.0, entropy=1.5, thoughts=thoughts)


def test_cells_of_a_table_are_escaped():
    html = table([HOSTILE, "b"], [["a", 3], [HOSTILE, None]], HOSTILE)
    assert assert_safe(html).count(re.sub(r"\s+", " ", EVIL)) == 3
    assert [tag for tag, _ in Page(html).tags if tag in ("th", "td")] == ["th"] * 2 + ["td"] * 4


def test_the_color_of_a_token_follows_its_gain():
    """Of gains up to 1 nat, 1 has the full color and 0.5 half of it."""
    assert limit([0.5, -1.0]) == 1.0
    assert limit([]) == 0.5
    html = colored(["a", "b", "<i>"], [0.5, -1.0, 0.0])
    assert re.findall(r"rgba\(([^)]*)\)", html) == ["0, 114, 178, 0.30", "213, 94, 0, 0.60", "213, 94, 0, 0.00"]
    assert "+0.500 nats" in html and "&lt;i&gt;" in html


def test_a_prediction_shows_both_distributions_and_its_thoughts():
    top, plain = (("red", 0.75), (HOSTILE, 0.25)), (("blue", 0.5), ("red", 0.5))
    thoughts = (thought(HOSTILE), thought("hmm", closed=False))
    logp = torch.tensor([0.75, 0.25]).log()
    text = assert_safe(Prediction(logp=logp, nothink=logp, thoughts=thoughts, top=top, nothink_top=plain)._repr_html_())
    assert all(part in text for part in ("red0.750blue0.500", "hmm ... (cut)"))
    alone = Prediction(logp=logp, nothink=logp, thoughts=(), top=top, nothink_top=plain)
    assert "thoughts" not in alone._repr_html_()


def test_gains_show_the_text_and_its_six_largest_gains_in_order():
    tokens = [scored(at, f"t{at}", -1.0 + 0.1 * at) for at in range(1, 8)]
    tokens[2] = scored(3, HOSTILE, math.log(0.5), thought(HOSTILE), thought("1 red"))
    found = Gains(tokens)
    assert found == tokens
    html = found._repr_html_()
    text = assert_safe(html)
    assert "+0.3070.3680.500" in text and "| 1 red" in text, "log 0.5 is 0.307 above −1; exp(−1) is 0.368"
    rows = re.findall(r"<tr><td[^>]*>(\d+)</td>", html)
    assert rows == ["2", "3", "4", "5", "6", "7"]


def test_runs_show_their_figures_and_positions_their_thoughts(tmp_path: Path):
    runs = forethought.read_runs(make_run(tmp_path / "one", steps=3), make_run(tmp_path / "<i>two", steps=3))
    text = Page(runs._repr_html_()).text
    assert [run.name for run in runs] == ["one", "<i>two"] and "<i>two" in text
    assert text.count("Accuracy, thinking") == 2, "for all positions, and for marked ones"
    assert "30.0 % → 60.0 %24.0 % to 36.0 % → 54.0 % to 66.0 %" in text.replace("\xa0", " ")
    position = next(one for one in runs[0].positions if "now under" in one.context)
    text = assert_safe(position._repr_html_())
    assert f"{position.thoughts[0].reward:.3f}" in text and "[ black]" in text


def test_curves_are_one_image(tmp_path: Path):
    [run] = runs = forethought.read_runs(make_run(tmp_path / "one", steps=3))
    image = runs.curves("gain", "length", "closed")
    page = Page(image._repr_svg_())
    sizes = [(attrs.get("width"), attrs.get("x"), attrs.get("y")) for tag, attrs in page.tags if tag == "svg"]
    assert sizes == [("900", None, None), ("450", "0", "0.0"), ("450", "450", "0.0"), ("450", "0", "270.0")]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and repr(image) == "<Drawing>"
    with pytest.raises(UserError, match=r"^curves: 'nothing': must be one of gain, "):
        runs.curves("nothing")
    assert run.path == tmp_path / "one"


def test_an_experiment_shows_claims_and_arms(tmp_path: Path):
    described = {"name": "small", "model": "m", "corpus": "c", "held_out": "h", "sweeps": [], "missing": {}}
    described["arms"] = {"rlp": {"options": {}, "budget": {}, "seeds": []}}
    described["claims"] = [{"claim": HOSTILE, "holds": holds, "evidence": "e"} for holds in (True, False, None)]
    rows = [
        {"arm": arm, "seed": "all", "metric": "all/accuracy_think", "value": value, "low": value - 0.1, "high": 0.9}
        for arm, value in (("base", 0.25), ("rlp", 0.75))
    ]
    (tmp_path / "experiment.json").write_text(json.dumps(described))
    (tmp_path / "compare.json").write_text(json.dumps(rows))
    text = assert_safe(forethought.read_comparison(tmp_path)._repr_html_()).replace("\xa0", " ")
    assert all(word in text for word in ("holds", "fails", "undecided"))
    assert "base25.0 %15.0 % to 90.0 %" in text and "rlp75.0 %65.0 % to 90.0 %" in text
