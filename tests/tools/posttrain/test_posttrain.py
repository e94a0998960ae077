"""Post-training: a stage's file, its examples and reward, TRL's trainers, and every arm of an experiment."""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from forethought import load, load_tokenizer
from forethought.cli import main
from forethought.config import Config, Notice, UserError
from forethought.data import worlds
from forethought.data.positions import ThoughtFormat, thought_format
from forethought.models.loading import EMBEDDED, load_model, load_thinking_options
from forethought.run.folder import RunLog
from forethought.run.trackers import Callbacks
from forethought.tools.experiment import compare
from forethought.tools.posttrain import chain, last_stage, posttrain
from forethought.tools.posttrain.stage import Example, Stage, Verified, examples, read, stage_config, stage_from_dict
from forethought.tools.report import card, runs
from forethought.tools.report import write as write_report
from forethought.trainer import resume
from helpers.models import config as tiny
from helpers.models import plain_targets, qwen3, word_tokenizer
from helpers.tokenizers import byte_level

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
QUICK = load("quickstart", ["--model.device", "cpu"])
SFT = Stage(stage="sft", data="world:cups/worked", max_tokens=128, train={"steps": 2, "batch": 4})
RLVR = Stage(stage="rlvr", data="world:cups/train", end=".", group=2, max_tokens=20, train={"steps": 1, "batch": 2})


def made(stage: Stage, start: Config = QUICK, tokenizer: Any = None) -> tuple[list[Any], Any, ThoughtFormat]:
    tokenizer = tokenizer or load_tokenizer(start.model)
    form = thought_format(tokenizer, start.method)
    options = stage_config(stage, start, Path("unused"), 0)
    return examples(stage, options, tokenizer, form), tokenizer, form


def test_a_stage_takes_nothing_of_how_its_start_was_trained(tmp_path):
    rpt = ["--method.name", "rpt", "--optim.learning_rate", "0.5", "--train.steps", "7", "--method.group", "3"]
    options = [stage_config(SFT, load("quickstart", [*rpt[: 2 * n]]), tmp_path, 4) for n in (0, 4)]
    assert options[0] == options[1]
    assert (options[0].seed, options[0].train.steps, options[0].train.batch) == (4, 2, 4)
    assert options[0].method.thought_length == QUICK.method.thought_length


def test_supervised_examples_end_a_prompt_at_the_opened_thought():
    rows, tokenizer, form = made(SFT)
    assert len(rows) == 8
    for row in rows:
        assert row.prompt[0] == tokenizer.bos_token_id and tuple(row.prompt[-1:]) == form.open
        said = tokenizer.decode(row.completion).split()
        closing = said.index("</think>")
        assert said[closing + 1 :] == [row.answer, "."]
        assert said[closing - 1] == row.answer
        assert tokenizer.decode(row.prompt[1:]).startswith("ball under")


def test_a_start_that_repeats_the_context_does_so_in_its_stages():
    """Its worked thoughts go on with the repeated tokens, which are no part of an answer."""
    start = dataclasses.replace(QUICK, method=dataclasses.replace(QUICK.method, repeat_context=2))
    rows, tokenizer, form = made(SFT, start)
    for row in rows:
        said = tokenizer.decode(row.completion).split()
        assert said[said.index("</think>") + 1 :] == ["now", "under", row.answer, "."]
    reward = Verified(RLVR, tokenizer, form)
    texts = ["now under red .", "now under blue .", "green blue red .", "red .", ""]
    ids = [tokenizer.encode(f"red </think> {text}", add_special_tokens=False) for text in texts]
    assert reward(ids, ["red"] * 5, [rows[0].repeated] * 5) == [1, 0, 0, 0, 0]


def test_thinking_options_of_the_start_are_kept():
    """Its delimiters, template and sampling, whatever they are."""
    changed = {"thought_length": 9, "temperature": 0.3, "top_p": 0.9, "repeat_context": 2, "min_thought_length": 3}
    start = dataclasses.replace(QUICK, method=dataclasses.replace(QUICK.method, **changed))
    method = stage_config(SFT, start, Path("unused"), 0).method
    assert {name: getattr(method, name) for name in changed} == changed


def test_without_thinking_the_answer_itself_is_the_completion():
    rows, tokenizer, _ = made(dataclasses.replace(SFT, data="world:cups/train", think=False))
    for row in rows:
        assert tokenizer.decode(row.completion) == f"{row.answer} ."
        assert tokenizer.decode(row.prompt).endswith("now under")


@pytest.mark.parametrize("think", [True, False])
def test_a_thought_that_is_not_right_before_the_answer_is_part_of_the_prompt(think: bool):
    stage = dataclasses.replace(RLVR, data="world:cups/pretrain", think=think, train={"steps": 10, "batch": 4})
    rows, tokenizer, _ = made(stage)
    elsewhere = 0
    for row in rows:
        prompt = tokenizer.decode(row.prompt)
        assert worlds.without_thoughts(prompt)[-2:] == ["now", "under"]
        assert prompt.endswith("<think>") == think
        assert think or worlds.without_thoughts(tokenizer.decode(row.completion)) == [row.answer, "."]
        elsewhere += "</think>" in prompt
    assert 0 < elsewhere < len(rows)


def test_verified_rewards_are_those_of_the_checker():
    rows, tokenizer, form = made(RLVR)
    reward, logged = Verified(RLVR, tokenizer, form), {}
    said = ["1 red </think> red .", "red </think> blue .", "red red red", "red </think> red </think> blue", "</think>"]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in said]
    assert reward(ids, ["red"] * 5, [[]] * 5, log_metric=logged.__setitem__) == [1, 0, 0, 1, 0]
    assert logged == {"answered": 0.8}
    assert all(not row.completion and tuple(row.prompt[-1:]) == form.open for row in rows)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "gsm8k.jsonl"
    rows = [
        {"question": "What is 1 + 1?", "answer": "2", "solution": "One and one <<1+1=2>>make two.\n#### 2"},
        {"question": "What is 2 + 2?", "answer": "Two and two make four.\n#### 4"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Letters:
    """A tokenizer of characters: enough to see how texts are put together."""

    eos_token_id, bos_token_id, unk_token_id, pad_token_id, is_fast = 0, None, None, 0, False

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(128)}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(char) for char in text]}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self(text)["input_ids"]

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(token) for token in tokens)


@pytest.mark.parametrize("think", [True, False])
def test_questions_show_the_way_as_a_thought(questions, think):
    stage = Stage(stage="sft", data=str(questions), think=think, train={"steps": 1, "batch": 5})
    rows, tokenizer, form = made(stage, tokenizer=Letters())
    assert len(rows) == 5
    texts = {tokenizer.decode(row.prompt) + "|" + tokenizer.decode(row.completion) for row in rows}
    opened, closed = ("<think>", "</think>") if think else ("", "")
    assert texts == {
        f"Question: What is 1 + 1?\nAnswer:{opened}| One and one make two.{closed} The answer is 2.\0",
        f"Question: What is 2 + 2?\nAnswer:{opened}| Two and two make four.{closed} The answer is 4.\0",
    }
    ending, _, _ = made(dataclasses.replace(stage, end="!"), tokenizer=Letters())
    assert {chr(row.completion[-1]) for row in ending} == {"!"}
    for package in ("lm_eval", "math_verify"):
        pytest.importorskip(package, reason="make test-lm-eval installs the extra eval")
    reward = Verified(stage, tokenizer, form)
    ids = [tokenizer.encode(f"so{closed} The answer is {n}.", add_special_tokens=False) for n in ("2", "2.0", "3")]
    assert reward(ids, ["2"] * 3, [[]] * 3) == [1, 1, 0]


def test_examples_that_are_too_long_are_skipped_whole_and_counted(questions):
    """The first question has 72 letters with its answer, the second 73: one in two is skipped."""
    stage = Stage(stage="sft", data=str(questions), think=False, max_tokens=72, train={"steps": 2, "batch": 2})
    with pytest.warns(Notice, match=r"^max_tokens = 72: \d of \d examples are longer and are skipped$") as told:
        rows, tokenizer, _ = made(stage, tokenizer=Letters())
    assert {tokenizer.decode(row.prompt + row.completion) for row in rows} == {
        "Question: What is 1 + 1?\nAnswer: One and one make two. The answer is 2.\0"
    }
    skipped, seen = (int(word) for word in str(told[0].message).split() if word.isdigit() and word != "72")
    assert (len(rows), seen) == (4, 4 + skipped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "world:cups/train"}, "contains no thoughts to train on"),
        ({"data": "world:chess/train"}, "data = 'world:chess/train': unknown world"),
        ({"data": "nothing.jsonl"}, "data = 'nothing.jsonl': No such file"),
        ({"data": "nothing.parquet"}, "must be world:NAME/SPLIT or a file of questions"),
        ({"max_tokens": 4}, "max_tokens = 4: "),
    ],
)
def test_data_that_a_stage_cannot_take_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        made(dataclasses.replace(SFT, **options))


def test_malformed_questions_are_named(tmp_path):
    for line in ('{"question": "a"}', "[1]", "{", '{"question": "a", "answer": " "}'):
        (tmp_path / "q.jsonl").write_text(f'{{"question": "a", "answer": "1", "solution": "b"}}\n{line}\n')
        with pytest.raises(UserError, match=r"q\.jsonl:2: "):
            made(dataclasses.replace(SFT, data=str(tmp_path / "q.jsonl")))


@pytest.mark.parametrize("option", ["--overwrite no", "--seed abc", "--seed 1.7"])
def test_options_of_the_folder_are_checked_like_those_of_a_run(tmp_path, capsys, option, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text('stage = "sft"\ndata = "world:cups/worked"')
    name, value = option.removeprefix("--").split()
    assert main(["posttrain", "s.toml", "--start", "embedded", *option.split()]) == 2
    said = capsys.readouterr().err
    assert f"{name} = " in said and value in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 3", "has no `stage`"),
        ('stage = "sft"\ndata = "x"\nfoo = 1', "unknown option foo"),
        ('stage = "dpo"\ndata = "x"', "stage = 'dpo'"),
        ('stage = "rlvr"\ndata = "x"\ngroup = 1', "group = 1"),
        ('stage = "rlvr"\ndata = "x"\n[train]\ntokens = 3', "train.tokens"),
        ('stage = "rlvr"\ndata = "x"\n[optim]\nlearning_rate = -1', "optim.learning_rate = -1"),
    ],
)
def test_mistakes_in_a_stage_file_are_one_line(tmp_path, capsys, text, message):
    (tmp_path / "s.toml").write_text(text)
    assert main(["posttrain", str(tmp_path / "s.toml"), "--start", "embedded"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_command_line_says_what_it_needs(capsys, tmp_path):
    for words in (["posttrain"], ["posttrain", "sft-cups"], ["posttrain", "--start", "embedded"]):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith("forethought: posttrain takes a stage's file")
    assert main(["train", "sft-cups"]) == 2
    assert "is a stage of post-training: forethought posttrain sft-cups" in capsys.readouterr().err
    end = ["--end", "ball under", "--run", str(tmp_path / "run")]
    assert main(["posttrain", "rlvr-cups", "--start", "embedded", *end]) == 2
    assert "end = 'ball under': must be one token" in capsys.readouterr().err
    assert main(["posttrain", "rlvr-cups", "--start", "embedded", "--end", "", "--run", str(tmp_path / "run")]) == 2
    assert "this tokenizer has no end-of-text token" in capsys.readouterr().err
    long = ["--max_tokens", "250", "--run", str(tmp_path / "run")]
    assert main(["posttrain", "rlvr-cups", "--start", "embedded", *long]) == 2
    assert "tokens, but the model's context window has 256" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_stages_follow_each_other_are_never_redone_and_repeat_to_the_bit(tmp_path):
    weights = []
    for name in ("one", "other"):
        last = chain([SFT, RLVR], QUICK, tmp_path / name, Callbacks())
        assert last == tmp_path / name / "2-rlvr"
        first = load_file(tmp_path / name / "1-sft" / "policy" / "model.safetensors")
        weights.append((first, load_file(last / "policy" / "model.safetensors")))
    base = load_file(EMBEDDED["embedded"] / "model.safetensors")
    (sft, rlvr), (sft_again, rlvr_again) = weights
    key = "model.layers.0.self_attn.q_proj.weight"
    assert not sft[key].equal(base[key]) and not rlvr[key].equal(sft[key])
    assert all(sft[name].equal(sft_again[name]) and rlvr[name].equal(rlvr_again[name]) for name in sft)
    assert RunLog.open(last).config().model.path == str(tmp_path / "other" / "1-sft" / "policy")
    assert json.loads((last / "policy" / "config.json").read_text())["eos_token_id"] is None
    assert load_thinking_options(str(last / "policy"))["method"]["thought_length"] == QUICK.method.thought_length
    before = (last / "summary.json").stat().st_mtime_ns
    assert chain([SFT, RLVR], QUICK, tmp_path / "other", Callbacks()) == last
    assert (last / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="contains a different rlvr stage"):
        chain([SFT, dataclasses.replace(RLVR, group=4)], QUICK, tmp_path / "other", Callbacks())
    with pytest.raises(UserError, match="exists and is not empty"):
        posttrain("sft-cups", "embedded", {"run": str(last)})
    (last / "summary.json").unlink()
    with pytest.raises(UserError, match="is a stage of post-training; begin it again"):
        resume(last)


def test_sft_learns_the_completion_alone(tmp_path):
    """One step of plain descent: the change of the weights is the gradient of the mean loss over completions."""
    from forethought.tools.trl import sft

    model = qwen3(scale=0.2)
    start = [one.detach().clone() for one in model.parameters()]
    pairs = [([5, 6, 7], [8, 9]), ([9, 5], [6, 7, 10])]
    rows = [Example(prompt=prompt, completion=completion, answer="") for prompt, completion in pairs]
    losses = [-plain_targets(model, prompt, completion) for prompt, completion in pairs]
    slopes = torch.autograd.grad(torch.cat(losses).mean(), list(model.parameters()))
    settings = tiny(batch=2)
    settings = dataclasses.replace(
        settings,
        train=dataclasses.replace(settings.train, steps=1),
        optim=dataclasses.replace(settings.optim, learning_rate=1e-3, gradient_clip=0.0),
        model=dataclasses.replace(settings.model, device="cpu"),
    )
    (line,) = sft((model, word_tokenizer()), rows, settings, lambda done, total: None)
    assert line["loss"] == pytest.approx(float(torch.cat(losses).mean().detach()), rel=1e-5)
    for now, then, slope in zip(model.parameters(), start, slopes, strict=True):
        clear = slope.abs() > 1e-5  # Adam's first step is the sign of the gradient
        assert torch.allclose((now - then)[clear], -1e-3 * slope.sign()[clear], rtol=0.01)


EXPERIMENT = """
config = "quickstart"
seeds = [0]
post = ["{sft}", "{rlvr}"]

[options]
model.device = "cpu"
method = {{ group = 2, thought_length = 6, positions = 1 }}
train = {{ steps = 1, batch = 4 }}
evaluate = {{ documents = 10, positions = 1, view = 0 }}

[arms.rlp]
[arms.mixed-sft]
options = {{ method.name = "cpt", corpus.path = "world:cups/mixed" }}

[[claims]]
arm = "rlp"
above = ["base"]
metrics = ["post:answer/accuracy_think"]
"""


@pytest.mark.slow
def test_an_experiment_takes_every_arm_and_the_base_through_the_same_stages(tmp_path):
    for name, stage in (("sft", SFT), ("rlvr", RLVR)):
        more = "".join(
            f"{key} = {json.dumps(value)}\n"
            for key, value in dataclasses.asdict(stage).items()
            if not isinstance(value, dict)
        )
        train = "".join(f"{key} = {value}\n" for key, value in stage.train.items())
        (tmp_path / f"{name}.toml").write_text(f"{more}[train]\n{train}")
        assert read(tmp_path / f"{name}.toml") == stage
    file = tmp_path / "post.toml"
    file.write_text(EXPERIMENT.format(sft=tmp_path / "sft.toml", rlvr=tmp_path / "rlvr.toml"))
    (verdict,), page = compare(file, {"run": str(tmp_path / "run")})
    assert verdict.holds is not None
    rows = {(row["arm"], row["seed"], row["metric"]) for row in json.loads((page.parent / "compare.json").read_text())}
    for arm in ("base", "rlp", "mixed-sft"):
        assert {(arm, "all", f"{when}answer/accuracy_think") for when in ("", "post:")} <= rows
    assert ("rlp", "all", "minus/base/post:answer/accuracy_think") in rows
    assert "post:answer" in page.read_text()
    runs = [page.parent / name / "seed-0" / "post" for name in ("base", "rlp", "mixed-sft")]
    stages = [json.loads((run / "2-rlvr" / "stage.json").read_text()) for run in runs]
    assert stages[0] == stages[1] == stages[2]
    options = [RunLog.open(run / "1-sft").config() for run in runs]
    starts = [one.model.path for one in options]
    assert starts == ["embedded", *(str(run.parent / "policy") for run in runs[1:])]
    assert len({(one.seed, one.optim, one.train, one.method.name) for one in options}) == 1
    records = [run / "2-rlvr" / "records.json" for run in runs]
    times = [one.stat().st_mtime_ns for one in records]
    compare(file, {"run": str(tmp_path / "run")})
    assert [one.stat().st_mtime_ns for one in records] == times


def test_an_answer_of_several_tokens_is_a_whole_word():
    """A tokenizer that cuts words into letters: the first of them is no answer."""
    plain = byte_level(["xyz"], trim=True)
    start = load("quickstart", ["--model.device", "cpu", "--corpus.window", "256"])
    rows, tokenizer, form = made(dataclasses.replace(RLVR, think=False, max_tokens=400), start, plain)
    assert all(len(row.answer) > 1 and row.answer.isalpha() for row in rows)
    reward = Verified(dataclasses.replace(RLVR, think=False), tokenizer, form)
    said = [tokenizer(text)["input_ids"] for text in (f" {rows[0].answer}.", f" {rows[0].answer[0]}")]
    assert reward(said, answer=[rows[0].answer] * 2, repeated=[[], []]) == [1.0, 0.0]


def test_a_stage_is_not_described_as_a_run_of_rlp(unlike, tmp_path, capsys):
    words = ["posttrain", "sft-gsm8k", "--start", "embedded", "--data", str(unlike), "--heldout", str(unlike)]
    assert main([*words, "--train.steps", "2", "--train.batch", "3", "--run", str(tmp_path / "run")]) == 0
    card.write(tmp_path / "run")
    text = (tmp_path / "run/policy/README.md").read_text()
    for part in ("by supervised fine-tuning (post-training with TRL)", f"| text | `{unlike}` |", "Loss per token of"):
        assert part in text
    assert "sft, 3 examples per step" in text and "rlp" not in text.lower()
    again = tomllib.loads(text.partition("```toml\n")[2].partition("```")[0])
    assert stage_from_dict(again, "card") == stage_from_dict(RunLog(tmp_path / "run").read_json("stage.json"), "run")
    state = runs.state(tmp_path / "run")
    assert (state.state, state.step, state.steps) == ("finished", 2, 2)
    page = write_report([tmp_path / "run"]).read_text()
    assert "by sft" in page and str(unlike) in page and "3 examples" in page and "rlp" not in page.lower()


@pytest.fixture
def unlike(tmp_path: Path) -> Path:
    """Questions that the words of the embedded world can spell."""
    file = tmp_path / "unlike.jsonl"
    words = ["red", "blue", "green"]
    rows = [{"question": f"ball under {one}", "answer": one, "solution": f"{one} {one}"} for one in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_held_out_rows_are_measured_before_and_after(unlike, tmp_path, capsys):
    from forethought.tools.trl import completion_loss

    words = ["posttrain", "sft-gsm8k", "--start", "embedded", "--data", str(unlike), "--heldout", str(unlike)]
    sizes = ["--train.steps", "4", "--train.batch", "3", "--optim.learning_rate", "1e-3", "--optim.warmup", "0"]
    assert main([*words, *sizes, "--run", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    said = capsys.readouterr().out
    assert f"{summary['before/heldout_loss']:.3f} before, {summary['after/heldout_loss']:.3f} after" in said
    assert summary["after/heldout_loss"] < summary["before/heldout_loss"] - 0.1

    stage = Stage(stage="sft", data=str(unlike), train={"steps": 1, "batch": 3})
    rows, _, _ = made(stage)
    model = load_model(QUICK.model, 0)
    total = torch.cat([by_hand(model, row.prompt, row.completion) for row in rows])
    assert completion_loss(model, rows) == pytest.approx(-float(total.mean()), rel=1e-5)
    assert summary["before/heldout_loss"] == pytest.approx(-float(total.mean()), rel=1e-5)

    file = ["--heldout", str(tmp_path / "none.jsonl"), "--run", str(tmp_path / "other")]
    assert main([*words[:6], *file]) == 2
    assert "heldout: data = " in capsys.readouterr().err
    assert main(["posttrain", "rlvr-cups", "--start", "embedded", *file]) == 2
    assert "only for sft stages" in capsys.readouterr().err


def by_hand(model: Any, prompt: list[int], completion: list[int]) -> Any:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return torch.stack([logits[len(prompt) + i - 1, token] for i, token in enumerate(completion)])


def test_a_trainer_reads_the_exact_tokens_of_a_prompt(tmp_path):
    """Tokens that no text is tokenized to reach the reward as they are."""
    from forethought.tools.trl import grpo

    tokenizer, seen = load_tokenizer(QUICK.model), []
    odd = [tokenizer.bos_token_id, tokenizer.bos_token_id, 9, 10]  # as text, TRL would add one more beginning
    assert tokenizer(tokenizer.decode(odd))["input_ids"] != odd

    def reward(prompts: Any, completion_ids: Any, **_: Any) -> list[float]:
        return [float(i) for i in range(len(completion_ids))]

    model = load_model(QUICK.model, 0)
    plain = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        tokens = options.get("input_ids", args[0] if args else None)
        seen.append(tokens[0, : len(odd)].tolist())
        return plain(*args, **options)

    model.forward = forward
    config = stage_config(RLVR, QUICK, tmp_path, 0)
    stage = dataclasses.replace(RLVR, max_tokens=4)
    rows = [Example(prompt=odd, completion=[], answer="")] * 2
    grpo((model, tokenizer), rows, reward, stage, config, lambda done, total: None)
    assert seen[0] == odd


def test_post_training_is_done_only_for_the_stages_of_the_file(tmp_path: Path):
    sft, rlvr = SFT, RLVR
    assert last_stage([sft], tmp_path) == tmp_path / "1-sft"
    (tmp_path / "1-sft").mkdir()
    (tmp_path / "1-sft" / "stage.json").write_text(json.dumps(dataclasses.asdict(sft)))
    assert last_stage([sft, rlvr], tmp_path) == tmp_path / "2-rlvr"
    assert last_stage([dataclasses.replace(sft, think=not sft.think)], tmp_path)  # unfinished: it starts again
    (tmp_path / "1-sft" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="1-sft contains a different sft stage"):
        last_stage([dataclasses.replace(sft, think=not sft.think)], tmp_path)
