"""documents.json: every position of a few windows, each figure as it is computed alone."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from forethought.config import Model, from_dict
from forethought.eval import evaluate, viewer
from forethought.models.loading import load_model, load_tokenizer
from forethought.run import checkpoint
from forethought.trainer import train
from helpers.heldout import EVALUATION, documents, quiet, subject
from helpers.models import FORM, plain_logits, plain_targets, qwen3, word_tokenizer
from helpers.runs import options, read_checkpoint
from helpers.tokenizers import byte_level

WORDS = word_tokenizer().get_vocab()


def viewed(shown: int = 2, members: int = 3, reference: Any = None, batch: int = 4, **method: Any) -> dict[str, Any]:
    base = subject(qwen3())
    settings = dataclasses.replace(
        base.config,
        evaluate=dataclasses.replace(base.config.evaluate, view=shown, view_thoughts=members),
        method=dataclasses.replace(base.config.method, **method),
        train=dataclasses.replace(base.config.train, rollout_batch=batch),
    )
    one = dataclasses.replace(base, config=settings)
    return viewer.documents(one, reference or one.model, documents(), "a-model", quiet)


def after_thought(context: list[int], thought: dict[str, Any]) -> list[int]:
    return [*FORM.prompt_tokens(context), *(WORDS[word] for word in thought["text"].split()), *FORM.close]


def assert_top(top: list[list[Any]], logp: torch.Tensor) -> None:
    assert [WORDS[word.strip()] for word, _ in top] == logp.topk(5).indices.tolist()
    assert all(word.startswith(" ") for word, _ in top)
    assert [p for _, p in top] == pytest.approx(logp.topk(5).values.exp().tolist(), abs=1e-5)


def test_every_position_of_the_first_windows_is_there():
    made = viewed()
    assert (made["version"], made["model"], len(made["documents"])) == (1, "a-model", 2)
    for shown, one in zip(made["documents"], documents(), strict=False):
        assert (shown["document"], shown["domain"]) == (one.document, None)
        assert [place["at"] for place in shown["positions"]] == list(range(1, len(one.tokens)))
        assert [place["target"] for place in shown["positions"]] == shown["tokens"][1:]
        assert "".join(shown["tokens"]) == word_tokenizer().decode(one.tokens)
        assert all(len(place["thoughts"]) == 3 for place in shown["positions"])
    assert viewed(shown=0)["documents"] == []
    assert len(viewed(shown=9)["documents"]) == 3


def test_the_figures_are_those_of_one_row_alone():
    model, other = qwen3(), qwen3(seed=5)
    (shown,) = viewed(shown=1, reference=other)["documents"]
    tokens = documents()[0].tokens
    for place in shown["positions"]:
        context, target = tokens[: place["at"]], tokens[place["at"]]
        with torch.no_grad():
            plain = plain_logits(other, context)[-1].log_softmax(-1)
        assert place["nothink"] == pytest.approx(float(plain[target]), abs=1e-5)
        assert_top(place["nothink_top"], plain)
        rewards = [one["reward"] for one in place["thoughts"]]
        for one in place["thoughts"]:
            assert one["length"] == len(one["text"].split()) + one["closed"]
            with torch.no_grad():
                after = plain_logits(model, after_thought(context, one))[-1].log_softmax(-1)
            assert one["evidence"] == pytest.approx(float(after[target]), abs=1e-5)
            assert one["reward"] == pytest.approx(one["evidence"] - place["nothink"], abs=1e-5)
            assert one["advantage"] == pytest.approx(3 / 2 * (one["reward"] - sum(rewards) / 3), abs=1e-5)
            assert_top(one["top"], after)


def test_the_batch_changes_nothing_and_neither_does_the_number_of_documents():
    whole, part, once = viewed(shown=2), viewed(shown=1), viewed(shown=1, batch=1000)
    assert whole["documents"][0] == part["documents"][0]
    for one, other in zip(once["documents"][0]["positions"], part["documents"][0]["positions"], strict=True):
        for mine, theirs in zip(one["thoughts"], other["thoughts"], strict=True):
            assert mine["text"] == theirs["text"]
            assert mine["reward"] == pytest.approx(theirs["reward"], abs=1e-5)


def test_a_horizon_ends_earlier_and_discounts():
    (shown,) = viewed(shown=1, horizon=3, discount=0.5)["documents"]
    assert [place["at"] for place in shown["positions"]] == [1, 2, 3]
    tokens, weights = documents()[0].tokens, torch.tensor([1.0, 0.5, 0.25])
    for place in shown["positions"]:
        context, targets = tokens[: place["at"]], tokens[place["at"] :][:3]
        for one in place["thoughts"]:
            with torch.no_grad():
                gains = plain_targets(qwen3(), after_thought(context, one), targets)
                gains -= plain_targets(qwen3(), context, targets)
            assert one["reward"] == pytest.approx(float((weights * gains).sum()), abs=1e-4)
        assert abs(sum(one["advantage"] for one in place["thoughts"])) < 1e-5


TEXT = "zażółć gęślą jaźń \N{SNOWMAN}\N{GRINNING FACE}  two  spaces\n\ttab <b>&amp;"


def test_pieces_of_bytes_join_to_the_text():
    tokenizer = byte_level(["plain words only"], trim=False)
    tokens = tokenizer(TEXT)["input_ids"]
    pieces = viewer.token_texts(tokenizer, tokens)
    assert len(pieces) == len(tokens) > len(TEXT) - 5
    assert "".join(pieces) == TEXT
    assert "" in pieces and "ż" in pieces
    cut = viewer.token_texts(tokenizer, tokens[: pieces.index("ż")])
    assert "".join(cut).rstrip("\ufffd") == "za"


def test_pieces_of_words_have_the_spaces_between_them_and_no_bos():
    tokenizer = word_tokenizer(bos=True)
    assert viewer.token_texts(tokenizer, [2, 5, 6, 2, 7]) == ["", "a", " b", " <bos>", " c"]
    assert viewer.token_texts(tokenizer, [5]) == ["a"]
    assert viewer.token_texts(tokenizer, []) == []


def nothink(shown: dict[str, Any]) -> list[float]:
    return [place["nothink"] for place in shown["positions"]]


def plain(folder: Path, shown: dict[str, Any], weights: dict[str, torch.Tensor] | None = None) -> list[float]:
    """log p of each true token by the model in a folder, or by the same model with other weights."""
    options = Model(path=str(folder), tokenizer="embedded")
    model, tokens = load_model(options, 0), load_tokenizer(options)("".join(shown["tokens"]))["input_ids"]
    if weights is not None:
        model.load_state_dict({name.partition("/")[2]: value for name, value in weights.items()}, strict=False)
    with torch.no_grad():
        logp = plain_logits(model, tokens)[:-1].log_softmax(-1)
    return [float(logp[at - 1, tokens[at]]) for at in range(1, len(tokens))]


def test_evaluate_writes_the_documents_beside_its_figures(tmp_path: Path):
    train(from_dict(options(tmp_path, "run", train={"steps": 2}, evaluate=EVALUATION)))
    run = tmp_path / "run"
    figures, _ = evaluate(run, {"evaluate": {"view": 1, "view_thoughts": 2}})
    (shown,) = json.loads((run / "documents.json").read_text())["documents"]
    assert shown["document"] == "cups/heldout/0/0" and shown["tokens"][:3] == ["", "ball", " under"]
    last = checkpoint.latest(run)
    assert last is not None
    teacher = read_checkpoint(last, only="teacher").tensors
    assert {name.split("/")[0] for name in teacher} == {"teacher"}
    assert read_checkpoint(last, only="nothing").tensors == {}
    assert figures["all/gain_over_teacher"] != figures["all/gain_self"]
    assert nothink(shown) == pytest.approx(plain(run / "policy", shown, teacher), abs=1e-5)
    shutil.rmtree(run / "checkpoints")
    figures, _ = evaluate(run, {"evaluate": {"view": 0}})
    assert "all/gain_over_teacher" not in figures
    assert json.loads((run / "documents.json").read_text())["documents"] == []


def test_without_a_teacher_rewards_are_over_the_base(tmp_path: Path):
    run = tmp_path / "run"
    values = options(tmp_path, "run", train={"steps": 2}, evaluate=EVALUATION, method={"teacher_every": 0})
    train(from_dict(values))
    figures, _ = evaluate(run, {"evaluate": {"view": 1}})
    assert "all/gain_over_teacher" not in figures
    (shown,) = json.loads((run / "documents.json").read_text())["documents"]
    start = from_dict(values)
    load_model(start.model, start.seed).save_pretrained(tmp_path / "start")
    assert nothink(shown) == pytest.approx(plain(tmp_path / "start", shown), abs=1e-5)
