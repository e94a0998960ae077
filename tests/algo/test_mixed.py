"""Mixed: the start's own thoughts that gained, written into the text, and next-token loss on both."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from forethought import load, train
from forethought.algo.mixed import Mixed, best
from forethought.algo.rlp import RLP
from forethought.config import Rollout, UserError, from_dict
from forethought.data.positions import ThoughtFormat, at_positions
from forethought.flops import Shape, cpt_step, rlp_step
from forethought.models.compute_copy import Network
from forethought.run.folder import read_lines
from helpers.models import (
    CLOSE,
    FORM,
    OPEN,
    WINDOWS,
    assert_close,
    collected,
    config,
    engine,
    gradients,
    plain_targets,
    qwen3,
    update,
    word_tokenizer,
)

SETTINGS = config(group=4, thought_length=9, name="mixed")


def mixed(model: Any, settings: Any = SETTINGS, form: ThoughtFormat = FORM) -> Mixed:
    return Mixed(Network(model, "fp32"), engine(model, settings, form), form, word_tokenizer(), settings)


def rows_of(method: Mixed, step: int = 1) -> list[list[int]]:
    batch = collected(method, WINDOWS, step)
    return [
        row[mask].tolist() for piece in batch.microbatches for row, mask in zip(piece.tokens, piece.mask, strict=True)
    ]


def test_the_best_closed_thought_of_a_window_is_kept_if_it_gained():
    positions = at_positions(WINDOWS[:3], [[1, 2], [1], [1]], 1)
    gains = torch.tensor([[0.5, 3.0], [2.0, 1.0], [-1.0, -2.0], [0.3, 0.2]])
    closed = torch.tensor([[True, False], [True, True], [True, True], [True, True]])
    kept = best(positions, gains, closed, float("-inf"))
    assert kept.tolist() == [[False, False], [True, False], [False, False], [True, False]]
    assert best(positions, gains, closed, 1.0).tolist() == [[False] * 2, [True, False], [False] * 2, [False] * 2]


def test_text_is_learned_without_thoughts_and_with_those_that_gained():
    model = qwen3(scale=0.2, seed=3)
    rows = rows_of(mixed(model))
    plain = [window.tokens for window in WINDOWS]
    assert rows[: len(WINDOWS)] == plain
    thoughtful = rows[len(WINDOWS) :]
    assert 0 < len(thoughtful) <= len(WINDOWS)
    for row in thoughtful:
        at, end = row.index(OPEN), row.index(CLOSE)
        context, thought, rest = row[:at], row[at + 1 : end], row[end + 1 :]
        assert context + rest in plain and thought and rest
        said, plainly = (
            plain_targets(model, read, rest[:1]).detach() for read in ([*context, OPEN, *thought, CLOSE], context)
        )
        assert float(said) > float(plainly)


def test_flops_are_those_of_the_start_that_samples_itself_whatever_engine_evaluates():
    model = qwen3(scale=0.2, seed=3)
    shape, other = Shape.of(model.config), dataclasses.replace(SETTINGS, rollout=Rollout(engine="vllm"))
    works = [collected(mixed(model, settings), WINDOWS, 1).work for settings in (SETTINGS, other)]
    assert rlp_step(shape, works[1]) == rlp_step(shape, works[0])


def test_flops_count_that_rounded_weights_make_the_start_read_again():
    model = qwen3(scale=0.2, seed=3)
    method, low = mixed(model), dataclasses.replace(SETTINGS, rollout=Rollout(precision="bf16"))
    record = method.collect(WINDOWS, 1)
    work, again = (record.work(method.form, settings) for settings in (SETTINGS, low))
    shape = Shape.of(model.config)
    assert again == dataclasses.replace(work, reread=work.tails)
    assert rlp_step(shape, again).score > rlp_step(shape, work).score


def test_the_thoughts_stay_those_of_the_start():
    model = qwen3(scale=0.2, seed=3)
    method = mixed(model)
    before = rows_of(method)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    method.after_step()
    assert rows_of(method) == before
    assert rows_of(mixed(model)) != before
    assert rows_of(method, step=2) != before
    assert method.state() == {}


def test_the_gradient_is_that_of_next_token_prediction_on_all_rows():
    model = qwen3(scale=0.2, seed=3)
    method = mixed(model)
    pieces = collected(method, WINDOWS, 1).microbatches
    total, count = torch.zeros(()), 0
    for row in rows_of(method):
        learned = torch.tensor(row[1:]) != OPEN
        total = total - plain_targets(model, row[:1], row[1:])[learned].sum()
        count += int(learned.sum())
    assert_close(update(method, pieces), gradients(model, total / count))


def test_what_is_repeated_after_a_thought_is_read_and_not_learned():
    form = ThoughtFormat(before=(6, 7), after=(8,), open=(OPEN,), close=(CLOSE,), bos=None, pad=0, repeat=2)
    texts, seen = [window.tokens for window in WINDOWS], 0
    for piece in collected(mixed(qwen3(scale=0.2, seed=3), form=form), WINDOWS, 1).microbatches:
        for row, mask, learned in zip(piece.tokens, piece.mask, piece.learned, strict=True):
            tokens = row[mask].tolist()
            if OPEN in tokens:
                at, end, seen = tokens.index(OPEN), tokens.index(CLOSE), seen + 1
                context = tokens[2 : at - 1]
                assert tokens[end + 1 : end + 3] == [context[0], *context][-2:]
                assert context + tokens[end + 3 :] in texts
                skipped = {0, 1, at - 1, at, end + 1, end + 2}
                assert learned[: len(tokens) - 1].tolist() == [i not in skipped for i in range(1, len(tokens))]
    assert seen > 0


@pytest.mark.parametrize("bos", [None, 5], ids=["no-bos", "bos"])
def test_the_template_is_read_and_not_learned(bos: int | None):
    """Even where its tokens are those of the text: what is inserted is known by its place."""
    form = ThoughtFormat(before=(6, 7), after=(8,), open=(OPEN,), close=(CLOSE,), bos=bos, pad=0)
    windows = [dataclasses.replace(window, tokens=[5, *window.tokens]) for window in WINDOWS]
    batch = collected(mixed(qwen3(scale=0.2, seed=3), form=form), windows, 1)
    seen = 0
    for piece in batch.microbatches:
        for row, mask, learned in zip(piece.tokens, piece.mask, piece.learned, strict=True):
            tokens = row[mask].tolist()
            wanted = [token != OPEN for token in tokens]
            if OPEN in tokens:
                at, head, seen = tokens.index(OPEN), int(bos is not None), seen + 1
                assert tokens[head : head + 2] == [6, 7] and tokens[at - 1] == 8
                for place in (head, head + 1, at - 1):
                    wanted[place] = False
            assert learned[: len(tokens) - 1].tolist() == wanted[1:] and not learned[len(tokens) - 1 :].any()
    assert seen > 0
    assert sum(int(piece.learned.sum()) for piece in batch.microbatches) == round(1 / batch.microbatches[0].scale)


def test_its_flops_are_those_of_the_thoughts_and_of_the_rows():
    model = qwen3(scale=0.2, seed=3)
    shape = Shape.known(model.config)
    assert shape is not None
    method = mixed(model)
    work = collected(method, WINDOWS, 1).work
    rival = collected(
        RLP(Network(model, "fp32"), engine(model, SETTINGS), FORM, word_tokenizer(), SETTINGS), WINDOWS, 1
    ).work
    mine, theirs = rlp_step(shape, work), rlp_step(shape, rival)
    assert mine.rollout == theirs.rollout > 0
    assert mine.training == cpt_step(shape, [len(row) for row in rows_of(method)]).total


def test_a_run_is_trained(tmp_path: Path):
    words = [
        "--method.name",
        "mixed",
        "--model.device",
        "cpu",
        "--train.batch",
        "8",
        "--train.checkpoint_every",
        "1",
        "--method.group",
        "4",
    ]
    short = [*words, "--evaluate.path", "", "--optim.schedule", "constant", "--train.log_every", "1"]
    whole = load("quickstart", [*short, "--train.steps", "2", "--run", str(tmp_path / "whole")])
    summary = train(whole)
    assert summary["flops_rollout"] > 0 and summary["flops_update"] > 0
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert all(0 < line["rollout/kept"] < 0.3 and line["objective/loss"] > 0 for line in lines)
    assert all(line["time/step_s"] > line["time/rollout_s"] > 0 < line["time/score_s"] for line in lines)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["method"]["name"] == "mixed"


def test_what_chooses_by_gain_takes_no_random_reward():
    with pytest.raises(UserError, match=r"method\.reward = 'random'"):
        from_dict({"method": {"name": "mixed", "reward": "random"}})
    assert dataclasses.replace(SETTINGS.method, name="mixed").policy == "uniform"
