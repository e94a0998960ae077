"""`forethought think`: figures against plain forwards, the terminal, the page, JSON, the prompt, and errors."""

import io
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from forethought import ThinkingModel
from forethought.cli import main
from forethought.models.loading import THINKING_FILE
from forethought.tools import think
from helpers.cli import complaint
from helpers.models import FORM, config, plain_logits, qwen3, word_tokenizer
from helpers.runs import cut, options, words

TEXT = "ball under red . swap 1 blue red . now under"
TOKENS = word_tokenizer().get_vocab()


def found(text: str = "a b c d e", **chosen: Any) -> tuple[ThinkingModel, dict[str, Any]]:
    model = ThinkingModel(qwen3(), word_tokenizer(), config(thought_length=5))
    return model, think.think(model, "m", ("t", text), think.Options(**chosen), lambda done, total: None)


def logp(model: ThinkingModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return plain_logits(model.model, tokens)[-1].log_softmax(-1)


def after(model: ThinkingModel, context: list[int], thought: dict[str, Any]) -> torch.Tensor:
    inside = [TOKENS[word] for word in thought["text"].split()]
    return logp(model, [*FORM.prompt_tokens(context), *inside, *FORM.close])


def lines(console: Console, renderables: Any) -> list[str]:
    for one in renderables:
        console.print(one)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("thoughts", [1, 3])
def test_figures_are_those_of_plain_forwards(thoughts: int):
    model, result = found(thoughts=thoughts, think_every=2)
    tokens, [document] = model.encode("a b c d e"), result["documents"]
    assert [place["at"] for place in document["positions"]] == [1, 3]
    for place in document["positions"]:
        context, target = tokens[: place["at"]], tokens[place["at"]]
        assert place["nothink"] == pytest.approx(float(logp(model, context)[target]), abs=1e-5)
        assert len(place["thoughts"]) == thoughts
        for one in place["thoughts"]:
            assert one["evidence"] == pytest.approx(float(after(model, context, one)[target]), abs=1e-5)
            assert (one["advantage"] is None) == (thoughts == 1)
    following = result["next"]
    plain = logp(model, tokens).exp()
    mixed = sum(after(model, tokens, one).exp() for one in following["thoughts"]) / thoughts
    for shown, wanted in ((following["nothink_top"], plain), (following["top"], mixed)):
        assert [TOKENS[word.strip()] for word, _ in shown] == wanted.topk(5).indices.tolist()
        assert [p for _, p in shown] == pytest.approx(wanted.topk(5).values.tolist(), abs=1e-5)


def test_a_seed_gives_the_same_thoughts_again_and_another_one_others():
    assert found(seed=3)[1] == found(seed=3)[1]
    texts = [[one["thoughts"][0]["text"] for one in found(seed=n)[1]["documents"][0]["positions"]] for n in (3, 4)]
    assert texts[0] != texts[1]


def test_a_text_of_one_token_has_no_token_to_think_about_but_the_next():
    result = found("a")[1]
    assert result["documents"][0]["positions"] == []
    assert result["next"]["thoughts"]


@pytest.mark.parametrize("width", [40, 120])
def test_the_width_of_the_terminal_is_kept_and_gains_are_colors(width: int):
    _, result = found(thoughts=2)
    for place in result["documents"][0]["positions"]:
        place["thoughts"][0]["text"] = "long " * 40 + "\x1b[31m"
    plain = lines(Console(file=io.StringIO(), width=width, color_system=None), think.shown(result, Console()))
    assert max(map(cell_len, plain)) <= width
    assert not any("\x1b" in line for line in plain)
    assert plain[0].strip() == "a b c d e"
    listed = [line.split() for line in plain if " nats" in line]
    for row, place in zip(listed, result["documents"][0]["positions"], strict=True):
        gain = sum(one["evidence"] for one in place["thoughts"]) / 2 - place["nothink"]
        assert row[:2] == [str(place["at"]), place["target"].strip()]
        assert float(row[2].replace("\N{MINUS SIGN}", "-")) == pytest.approx(gain, abs=6e-4)


def test_tokens_are_blue_where_thoughts_help_and_orange_where_they_hurt():
    shown = Console(force_terminal=True, color_system="truecolor", no_color=False)
    text = think.colored(["a", " b", " c", " d"], [None, 1.0, -0.4, 0.01], shown)
    assert text.plain.startswith("a b c d\n\n hurts by 1 nats   helps by 1 nats ")
    styles = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]
    assert styles[:2] == [(" b", f"#000000 on {think.HELPS[2]}"), (" c", f"#000000 on {think.HURTS[1]}")]
    assert [style for _, style in styles[2:]] == [f"#000000 on {colors[2]}" for colors in (think.HURTS, think.HELPS)]
    uncolored = Console(force_terminal=True, color_system="truecolor", no_color=True)
    assert think.colored(["a"], [1.0], uncolored).plain == "a"


def test_the_command_shows_a_text_and_writes_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "new" / "page.html"
    assert main(["think", "embedded", *TEXT.split(), "--html", str(page), "--think_every=4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(TEXT)
    assert "\x1b" not in out
    assert [line.split()[0] for line in out.splitlines() if " nats" in line] == ["1", "5", "9"]
    assert f"page: {page}" in out.replace("\n", "")
    html = page.read_text()
    assert html.count("<script") == 2
    assert f"<h1>{TEXT}</h1>" in html
    data = json.loads(html.partition('id="viewer-data">')[2].partition("</script>")[0])
    [document] = data["documents"]
    assert [one["at"] for one in document["versions"]["0"]["positions"]] == [1, 5, 9]


def test_json_is_all_that_is_printed_and_a_file_and_stdin_are_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "text.txt"
    file.write_text(TEXT + "\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    made = []
    for text in (TEXT, str(file), "-"):
        assert main(["think", "embedded", text, "--json", "--thoughts", "2"]) == 0
        made.append(json.loads(capsys.readouterr().out))
    assert [one["documents"][0]["document"] for one in made] == [TEXT, str(file), "stdin"]
    assert all("".join(one["documents"][0]["tokens"]) == TEXT for one in made)
    assert math.isclose(sum(p for _, p in made[0]["next"]["nothink_top"]), 1, abs_tol=0.01)  # five cups


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "think takes a run folder or a model"),
        (["./nothing", "a"], "model.path = './nothing' cannot be loaded: no such folder"),
        (["embedded", " "], "text '': is empty"),
        (["embedded", "empty.txt"], "text 'empty.txt': is empty"),
        (["embedded", "ball " * 300], "the model's context window has 256"),
        (["embedded", "binary.txt"], "binary.txt:2: not UTF-8 (byte 0xff)"),
        (["embedded", "a\udcff"], "not UTF-8 (byte 0xff)"),
        (["embedded", "--html", "x"], "think takes --json and --html with a text"),
        (["embedded", "a", "--thoughts", "0"], "--thoughts 0: Input should be greater than 0"),
        (["embedded", "a", "--thought", "1"], "unknown option thought"),
        (["embedded", "ball red", "--html", "binary.txt/page.html"], "cannot write"),  # and no word of thinking
        (["embedded", "ball red", "--html", "."], "cannot write '.': is a folder; name a file"),
    ],
)
def test_a_wrong_command_is_one_line(
    command: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"a\n\xff")
    assert message in complaint(capsys, ["think", *command])


def test_a_text_that_the_model_cannot_read_is_said(capsys: pytest.CaptureFixture[str]):
    short = ["--method.thought_length", "2"]
    assert main(["think", "embedded", "hello big world ball", *short]) == 0
    assert "forethought: embedded does not know most of these words and reads <unk>" in capsys.readouterr().err
    assert main(["think", "embedded", "ball under red hello", *short]) == 0
    assert "<unk>" not in capsys.readouterr().err


def test_a_run_is_its_policy_and_a_model_that_was_never_trained_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    values = options(tmp_path, "run", train={"steps": 1})
    assert main(words(values)) == 0
    run = tmp_path / "run"
    command, said = ["red swap", "--json"], []
    capsys.readouterr()
    for model in (run, run / "policy"):
        assert main(["think", str(model), *command]) == 0
        said.append(capsys.readouterr())
    one, other = (json.loads(each.out) for each in said)
    assert one.pop("model") == str(run)
    assert other.pop("model") == str(run / "policy")
    assert one == other
    assert "never trained" not in said[0].err
    (run / "policy" / THINKING_FILE).unlink()
    assert main(["think", str(run / "policy"), *command]) == 0
    assert f"forethought: {run / 'policy'} was never trained to think: " in capsys.readouterr().err
    assert "is not finished (its newest checkpoint is" in complaint(capsys, ["think", str(cut(run, "half", 1)), "red"])


def prompted(monkeypatch: pytest.MonkeyPatch, *answers: str | type[BaseException]) -> None:
    given = iter([*answers, EOFError])

    def read(prompt: str = "") -> str:
        one = next(given)
        if isinstance(one, str):
            return one
        raise one

    monkeypatch.setattr("builtins.input", read)


def test_the_prompt_writes_on_as_the_model_generates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    prompted(monkeypatch, TEXT, "", "red")
    assert main(["think", "embedded", "--max_tokens", "3", "--think_every=2", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    model, start = ThinkingModel.load("embedded"), 0
    for text in (TEXT, "red"):
        tokens = list(model.generate(text, max_tokens=3, think_every=2, seed=5))
        for token in tokens:
            for wanted in (f"{token.at} {token.text.strip()}", *(one.text for one in token.thoughts)):
                start = out.index(wanted, start)
        start = out.index(text + "".join(token.text for token in tokens), start)
    assert out.count("thought ") == sum(bool(token.thoughts) for token in tokens) * 2


def test_at_the_prompt_a_signal_and_a_wrong_text_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    prompted(monkeypatch, KeyboardInterrupt)
    assert complaint(capsys, ["think", "embedded"], 128 + signal.SIGINT) == "interrupted"
    prompted(monkeypatch, "red \udcff")
    assert complaint(capsys, ["think", "embedded"]) == "text: is not UTF-8"
    prompted(monkeypatch, "red " * 200)
    assert "context window has 256" in complaint(capsys, ["think", "embedded"])


def test_the_prompt_ends_with_the_reader_of_its_output(monkeypatch: pytest.MonkeyPatch):
    prompted(monkeypatch, "red", AssertionError)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["think", "embedded", "--max_tokens", "1"]) == 128 + signal.SIGPIPE


def test_help_says_what_the_options_are(capsys: pytest.CaptureFixture[str]):
    assert main(["think", "--help"]) == 0
    out = capsys.readouterr().out
    for name in think.Options.__dataclass_fields__:
        assert f"  --{name} " in out
    assert "--method.thought_length" in out
