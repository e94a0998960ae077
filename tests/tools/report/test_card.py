"""The files of an exported model: its card, its metadata, and the options of its thoughts."""

import dataclasses
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from forethought import ThinkingModel, UserError, evaluate, train
from forethought.cli import main
from forethought.config import Config, Corpus, Method, Model, from_dict, load, to_dict
from forethought.models.loading import EMBEDDED, THINKING_FILE, load_thinking_options, save_thinking_options
from forethought.run.folder import RunLog
from forethought.tools.report import card
from forethought.tools.report.card import text, toml, write
from helpers.cli import complaint
from helpers.pages import make_run
from helpers.runs import options

SUMMARY: dict[str, Any] = {
    "method": "rlp", "steps": 20, "seconds": 125.0, "documents": 640, "tokens": 25_600, "flops": 3.21e12,
    "flops_rollout": 1e12, "flops_update": 2.21e12,
    "before/all/gain_over_base": -0.013, "before/all/gain_over_base/low": -0.02, "before/all/gain_over_base/high": 0.0,
    "after/all/gain_over_base": 0.5, "after/all/gain_over_base/low": 0.4, "after/all/gain_over_base/high": 0.625,
    "before/all/positions": 5000, "after/all/positions": 5000,
    "before/answer/accuracy_think": 0.624, "after/answer/accuracy_think": 0.98, "after/answer/positions": 500,
}  # fmt: skip
MEASURED: dict[str, Any] = {
    "seed": 0, "all/gain_self": 0.51, "all/gain_self/low": 0.4, "all/gain_self/high": 0.6, "all/positions": 5000,
    "all/gain_shuffled": -1.25, "all/gain_shuffled/low": -1.5, "all/gain_shuffled/high": -1.0,
    "all/gain_empty": 0.03, "all/truth": 0.995,
}  # fmt: skip
HELD_OUT = {"evaluate": {"path": "world:cups/heldout"}}


def test_a_card_says_what_was_done_and_what_came_of_it():
    config = from_dict({**HELD_OUT, "run": "runs/mine", "method": {"group": 8}})
    shown = text(config, SUMMARY).replace("\N{NO-BREAK SPACE}", " ")
    for line in (
        "# mine",
        "Trained from the base model `embedded` by RLP, reinforcement learning pretraining",
        "| text | `world:cups/train`, windows of at most 2,048 tokens |",
        "| method | rlp, 512 positions per step, 8 thoughts per position, horizon 1 |",
        "| steps | 20 |",
        "| tokens of text | 25,600 |",
        "| FLOPs | 3.21e+12 |",
        "| wall time | 2 min 5 s |",
        "| all: 5,000 positions | before | after |",
        "| Gain over the base | −0.013 [−0.020 to 0.000] | 0.500 [0.400 to 0.625] |",
        "| Accuracy, thinking | 62.4 % | 98.0 % |",
        "Not measured yet. `forethought evaluate` on the run folder measures",
    ):
        assert line in shown, line
    assert shown.index("| all: 5,000") < shown.index("| answer: 500 positions")


def test_a_card_takes_up_the_controls():
    shown = text(from_dict(HELD_OUT), SUMMARY, MEASURED).replace("\N{NO-BREAK SPACE}", " ")
    controls = shown[shown.index("## Controls") :]
    assert "Not measured yet" not in controls
    for line in (
        "| Gain over itself | 0.510 [0.400 to 0.600] |",
        "| Gain of another's thought | −1.250 [−1.500 to −1.000] |",
        "| Gain of an empty thought | 0.030 |",
        "| Right statements | 99.5 % |",
    ):
        assert line in controls


def test_a_card_without_held_out_text_says_so():
    assert "None: the run had no held-out text" in text(Config(), {"steps": 3})
    plain = text(from_dict({"method": {"name": "cpt"}}), {"steps": 3})
    assert "next-token prediction without thoughts" in plain
    assert "| method | cpt, 512 windows per step |" in plain
    assert "a control" in text(from_dict({"method": {"reward": "random"}}), {"steps": 3})


@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-1.7B-Base"),
        ("embedded", None),
        ("./Qwen/Qwen3", None),
        ("models/smollm2.gguf", None),
        ("/data/a model", None),
    ],
)
def test_the_metadata_names_what_the_hub_can_find(tmp_path: Path, path: str, base: str | None):
    config = Config(model=Model(path=path), corpus=Corpus(path="hub:HuggingFaceFW/fineweb"))
    (tmp_path / "README.md").write_text(text(config, SUMMARY))
    data = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False).data
    assert (data.base_model, data.datasets) == (base, ["HuggingFaceFW/fineweb"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["forethought", "rlp", "reasoning"]
    local = text(Config(), SUMMARY)
    assert "datasets:" not in local.split("---")[1]
    assert "license:" not in local.split("---")[1]


@pytest.mark.parametrize(("options", "shortest"), [({}, 1), ({"allow_empty": True}, 0), ({"min_thought_length": 5}, 5)])
def test_a_card_says_how_long_thoughts_are(options: dict[str, Any], shortest: int):
    shown = " ".join(text(Config(method=Method(thought_length=9, **options)), SUMMARY).split())
    assert f"have {shortest} to 9 tokens" in shown


def test_a_folder_on_the_disk_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert "base_model" not in text(Config(model=Model(path="models/mine")), SUMMARY)


def test_text_of_the_user_cannot_break_the_card():
    odd = Config(model=Model(path="a|b`c\n# Title"), method=Method(open="`", close="|", prompt="```\n{context}"))
    shown = text(odd, SUMMARY)
    assert "\n# Title" not in shown
    assert [line.count("|") - line.count("\\|") for line in shown.splitlines() if "base model |" in line] == [3]


WORDS = st.text(st.characters(codec="utf-8"), min_size=1)


@given(WORDS, WORDS, st.floats(0, 1, exclude_min=True), st.integers(0, 2**62))
def test_the_recipe_of_a_card_is_the_same_config(opening: str, path: str, top_p: float, seed: int):
    method = Method(open=opening, top_p=top_p, min_gain=-2.5, clamp_gain=True)
    config = Config(seed=seed, corpus=Corpus(path=path), method=method)
    assert from_dict(tomllib.loads(toml(config))) == config


def test_the_recipe_of_every_default_is_empty():
    assert toml(Config(overwrite=True)) == ""
    quickstart = load("quickstart")
    assert from_dict(tomllib.loads(toml(quickstart))) == quickstart


def test_a_run_exports_its_card_and_its_way_of_thinking(tmp_path: Path):
    values = options(tmp_path, "run", train={"steps": 2}, method={"close": "</think>", "thought_length": 7})
    train(from_dict(values))
    folder = tmp_path / "run" / "policy"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    config = RunLog.open(tmp_path / "run").config()  # with the sizes that were chosen
    assert (folder / "README.md").read_text() == text(config, summary)
    saved = json.loads((folder / THINKING_FILE).read_text())
    method = saved["method"]
    assert (saved["version"], method["close"], method["thought_length"]) == (1, "</think>", 7)
    one = ThinkingModel.load(folder)
    assert (one.config.method.thought_length, one.form.close) == (7, tuple(one.encode("</think>")[1:]))
    assert len(list(one.generate(one.encode("<think>")[:1], max_tokens=2))) == 2


def test_an_evaluation_writes_the_controls_into_the_card(tmp_path: Path):
    values = options(tmp_path, "run", train={"steps": 2})
    train(from_dict(values))
    card = tmp_path / "run" / "policy" / "README.md"
    assert "Not measured yet" in card.read_text()
    held_out = {"path": "world:cups/heldout", "documents": 5, "positions": 2, "view": 0}
    figures, file = evaluate(tmp_path / "run", {"evaluate": held_out, "method": {"thought_length": 3}})
    changed = {f"evaluate.{name}": value for name, value in held_out.items()} | {"method.thought_length": 3}
    assert figures["options"] == json.loads(file.read_text())["options"] == changed
    said = "On `world:cups/heldout` with `method.thought_length = 3`, `evaluate.documents = 5`, "
    assert said in card.read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert card.read_text() == text(RunLog.open(tmp_path / "run").config(), summary, figures)
    assert "Gain of another's thought" in card.read_text() and "Gain of a generic thought" in card.read_text()
    assert f"The generic thought, chosen on training text: `{figures['generic_thought']}`" in card.read_text()
    written = card.read_text()
    card.unlink()
    write(tmp_path / "run")
    assert card.read_text() == written
    (tmp_path / "run" / "summary.json").unlink()
    card.unlink()
    write(tmp_path / "run")
    assert not card.exists()


def own_method() -> None:
    """A method of the user."""


def own_reward() -> None:
    """A reward of the user."""


def test_a_card_takes_a_method_and_a_reward_from_outside_the_package():
    options = {"name": f"{__name__}:own_method", "reward": f"{__name__}:own_reward", "group": 8}
    shown = text(from_dict({**HELD_OUT, "method": options}), SUMMARY | {"before/all/own": 1.5, "after/all/own": 2.5})
    for line in (
        f"by `{__name__}:own_method`: A method of the user. Made with",
        f"| method | {__name__}:own_method, 512 positions per step, 8 thoughts per position, horizon 1; reward "
        f"{__name__}:own_reward |",
        "| Own | 1.5 | 2.5 |",
    ):
        assert line in shown, line


def test_how_a_model_thinks_survives_the_folder(tmp_path: Path):
    kept = Method(open="(", close=") ", prompt="a {context} b", thought_length=9, temperature=0.3, top_p=0.9)
    method = dataclasses.replace(kept, group=5, min_thought_length=4)
    save_thinking_options(tmp_path, Config(method=method, model=Model(prefix="replicated")))
    found = from_dict(load_thinking_options(str(tmp_path)))
    assert found.method == dataclasses.replace(method, group=Method().group)
    assert found.model.prefix == "replicated"
    assert load_thinking_options(str(tmp_path / "..")) == {}


def test_the_embedded_bases_carry_their_quickstart():
    for name, config in (("embedded", "quickstart"), ("embedded:notes", "quickstart-notes")):
        wanted = to_dict(load(config))
        for section, values in load_thinking_options(name).items():
            assert values == {option: wanted[section][option] for option in values}
        assert (EMBEDDED[name] / THINKING_FILE).is_file()


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 2}', '{"version": 1, "method": 3}'])
def test_a_broken_file_is_refused(tmp_path: Path, content: str):
    (tmp_path / THINKING_FILE).write_text(content)
    with pytest.raises(UserError, match=r"^model.path = .* cannot be loaded: "):
        load_thinking_options(str(tmp_path))


def test_a_file_of_wrong_options_is_refused(tmp_path: Path):
    (tmp_path / THINKING_FILE).write_text('{"version": 1, "method": {"thought_length": 0, "group": 3}}')
    with pytest.raises(UserError, match=r"^method.thought_length = 0"):
        ThinkingModel.load(tmp_path)


class FakeHub:
    """What `push` asks of the hub's client; `error` is raised by the upload."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, name: str, **more: Any) -> str:
        self.calls.append((name, more))
        return f"https://huggingface.co/{name}"

    def repo_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=name != "me/public")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append((repo_id, {"files": sorted(path.name for path in folder_path.iterdir())}))


def made(path: Path, **how: Any) -> Path:
    run = make_run(path, steps=2, **how)
    RunLog(run).write_config(Config())
    return run


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with a policy of two small files, and a hub that is not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(card, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    run = made(Path("q"))
    (run / "policy" / ".git").mkdir(parents=True)
    (run / "policy" / ".git" / "config").write_text("not uploaded")
    (run / "policy" / "config.json").write_text("{}")
    (run / "policy" / "model.safetensors").write_bytes(bytes(1234))
    return run


def test_a_push_without_a_network_lists_what_would_go(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["push", "q", "me/mine", "--dry-run"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    size = (trained / "policy" / "README.md").stat().st_size  # the card is written where it is missing
    assert [(row[0], row[-1]) for row in rows[:3]] == [
        (f"{size:,}", "README.md"), ("2", "config.json"), ("1,234", "model.safetensors"),
    ]  # fmt: skip
    assert " ".join(rows[3]) == f"{size + 1236:,} bytes in 3 files of q/policy"
    assert FakeHub.calls == []


def test_a_push_uploads_the_policy_and_keeps_an_edited_card(trained: Path, capsys: pytest.CaptureFixture[str]):
    edited = "---\nlicense: mit\n---\n# Mine\n"
    (trained / "policy" / "README.md").write_text(edited)
    assert main(["push", "q", "me/mine", "--private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "uploaded to https://huggingface.co/me/mine"
    [created, uploaded] = FakeHub.calls
    assert created == ("me/mine", {"private": True, "exist_ok": True})
    assert uploaded[0] == "me/mine"
    assert {"README.md", "config.json", "model.safetensors"} <= set(uploaded[1]["files"])
    assert (trained / "policy" / "README.md").read_text() == edited


def test_a_private_push_does_not_go_to_a_public_repository(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["push", "q", "me/public", "--private"]) == 2
    assert "push to 'me/public': it exists and is public; make it private" in capsys.readouterr().err
    assert [name for name, _ in FakeHub.calls] == ["me/public"], "made, and nothing uploaded"


@pytest.mark.parametrize(
    ("words", "card_text", "message"),
    [
        ([], "", "push takes a run folder"),
        (["q"], "", "push takes a run folder, user/name, and --private or --dry_run"),
        (["q", "--private"], "", "push takes a run folder, user/name"),
        (["q", "me/mine", "--force"], "", "push takes a run folder, user/name"),
        (["nothing", "me/mine"], "", "run 'nothing': no such folder"),
        (["half", "me/mine"], "", "run 'half' is not finished; finish it with: forethought train --resume half"),
        (["q", "mine"], "", "push to 'mine': the name of a model on the hub is user/name"),
        (["q", "me/my--model"], "", "push to 'me/my--model': Cannot have -- or .. in repo_id"),
        (["q", "me/mine"], "---\n- a list\n---\n", "q/policy/README.md: repo card metadata block should be a dict"),
        (["q", "me/mine"], "---\na: [\n---\n", "q/policy/README.md: while parsing a flow node"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(
    words: list[str], card_text: str, message: str, trained: Path, capsys: pytest.CaptureFixture[str]
):
    made(Path("half"), evaluated=False)
    if card_text:
        (trained / "policy" / "README.md").write_text(card_text)
    assert message in complaint(capsys, ["push", *words])
    assert FakeHub.calls == []


def test_errors_of_the_hub_are_one_line(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for error in (OSError("no route\nto host"), RuntimeError("401 Client Error.\n\nno such namespace")):
        monkeypatch.setattr(FakeHub, "error", error)
        assert main(["push", "q", "me/mine"]) == 2
        assert capsys.readouterr().err == f"forethought: push to 'me/mine': {' '.join(str(error).split())}\n"
    monkeypatch.setattr(card, "get_token", lambda: None)
    assert main(["push", "q", "me/mine"]) == 2
    assert "not logged in to the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
