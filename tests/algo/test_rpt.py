"""RPT: bytes of tokens, what is right, what is learned, where to think, and runs."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from forethought.algo.position_sampler import PositionSampler
from forethought.algo.rewards import prefix_match
from forethought.algo.rpt import RPT, join, parse_predictions
from forethought.cli import main
from forethought.config import Method, UserError, from_dict
from forethought.data.positions import ThoughtFormat, at_positions, draw_positions, make_generator, uncertain
from forethought.data.token_bytes import TokenBytes
from forethought.flops import Shape, Work, forward_flops, rlp_step
from forethought.models.compute_copy import Network
from forethought.models.loading import EMBEDDED
from forethought.rollout import Thoughts, draw_noise
from forethought.run.folder import RunLog, read_lines
from forethought.run.trackers import Callbacks
from forethought.trainer import Trainer, resume, train
from helpers.enumerate import Enumerated, every_thought, expected_group_gradient, tiny
from helpers.flops import counted
from helpers.models import (
    CLOSE,
    FORM,
    LONG,
    OPEN,
    WINDOWS,
    A,
    assert_close,
    collected,
    config,
    engine,
    gradients,
    plain_logits,
    plain_thought,
    qwen3,
    update,
    window,
    word_tokenizer,
    written,
)
from helpers.runs import assert_same_run, options
from helpers.sampling import biased

TEXT = "naïve 日本 🙂 a\tb\n  end"
ENDED = ThoughtFormat(before=(), after=(), open=(OPEN,), close=(CLOSE,), bos=None, pad=0, end=(A,))


def rpt(model: Any, settings: Any, form: ThoughtFormat = FORM) -> RPT:
    return RPT(Network(model, "fp32"), engine(model, settings, form), form, word_tokenizer(), settings)


def settings(**method: Any) -> Any:
    return config(**{"name": "rpt", "position_policy": "uniform", **method})


def byte_level() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, special_tokens=["<end>"])
    plain.train_from_iterator(["under under the end"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")


def sentence_pieces() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁under", "e", "n", "d", "a", "ï"]
    plain = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")


@pytest.mark.parametrize("build", [byte_level, sentence_pieces])
def test_tokens_spell_the_bytes_of_the_text(build):
    tokenizer = build()
    spelling, tokens = TokenBytes(tokenizer), tokenizer.encode(TEXT, add_special_tokens=False)
    spelled = [spelling.token(token) for token in tokens]
    assert b"".join(spelled) == TEXT.encode()
    assert any(len(one) == 1 and one[0] >= 0x80 for one in spelled)  # a part of a character


def test_words_stand_behind_a_space_and_added_tokens_spell_their_names():
    spelling = TokenBytes(word_tokenizer())
    assert [spelling.token(token) for token in (5, OPEN, 1)] == [b" a", b" <think>", b"<unk>"]
    assert TokenBytes(byte_level()).token(0) == b"<end>"
    plain = Tokenizer(models.WordPiece({"[UNK]": 0, "end": 1, "##ing": 2}, unk_token="[UNK]"))
    plain.decoder = decoders.WordPiece()
    pieces = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=plain))
    assert [pieces.token(token) for token in (1, 2)] == [b" end", b"ing"]


def test_a_row_that_the_tokenizer_does_not_know_spells_nothing():
    assert TokenBytes(byte_level()).token(10_000) == b""


NIHON = "日本".encode()


@pytest.mark.parametrize(
    ("prediction", "truth", "right"),
    [
        ([b" under"], [b" under", b" red"], True),
        ([b" under"], [b" un", b"der", b" red"], True),
        ([b" un", b"der"], [b" under"], True),
        ([b" under", b" red"], [b" under", b" red"], True),
        ([b" un"], [b" under"], False),  # ends inside a token of the truth
        ([b"under"], [b" under"], False),  # the space counts
        ([b" under"], [b" undone"], False),
        ([b" under", b" red", b"."], [b" under", b" red"], False),  # longer than what is left
        ([], [b" under"], False),
        ([b""], [b" under"], False),
        ([b" under"], [], False),
        ([NIHON[:1]], [NIHON[:1], NIHON[1:]], True),  # half a character is a token here ...
        ([NIHON[:1]], [NIHON], False),  # ... and not here
        ([NIHON[:1], NIHON[1:]], [NIHON], True),
        ([NIHON[:2], NIHON[2:4]], [NIHON[:3], NIHON[3:]], False),
        ([NIHON[:2], NIHON[2:3]], [NIHON[:3], NIHON[3:]], True),
        ([b" under"], [b"", b" under"], True),
    ],
)
def test_right_is_a_prefix_that_ends_at_a_token(prediction, truth, right):
    assert prefix_match(prediction, truth) is right


PIECES = st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=6)


@given(truth=PIECES, cuts=st.sets(st.integers(1, 17)), more=st.binary(max_size=2))
def test_right_whatever_the_prediction_is_cut_into(truth, cuts, more):
    whole = b"".join(truth)
    ends = {len(b"".join(truth[: n + 1])) for n in range(len(truth))}
    for length in range(len(whole) + 1):
        edges = [0, *sorted(cut for cut in cuts if cut < length), length]
        pieces = [whole[a:b] for a, b in pairwise(edges)]
        assert prefix_match(pieces, truth) == (length in ends)
    assert not prefix_match([whole, more + b"x"], truth)


def responses(written: list[list[int]], closed: list[bool], lengths: list[int]) -> Thoughts:
    """One position; thoughts of tokens 7 and log-probabilities -1, -2, ...; written ones -10, -20, ..."""
    width, tokens = max(lengths), torch.tensor([written])
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Thoughts(
        tokens=torch.full((1, len(lengths), width), 7).where(mask, 0),
        mask=mask[None],
        closed=torch.tensor([closed]),
        logp=-(torch.arange(width) + 1.0).expand(1, len(lengths), -1) * mask,
        evidence=torch.zeros(1, len(lengths), 1),
        hit=torch.zeros(1, len(lengths), 1, dtype=torch.bool),
        written=tokens,
        written_logp=-10 * (torch.arange(tokens.shape[2]) + 1.0).expand(tokens.shape),
    )


def test_predictions_by_hand():
    sampled = responses([[8, 9, A], [A, 8, 9], [8, A, 9], [8, 9, 8], [8, A, 8]], [True] * 4 + [False], [2, 1, 2, 3, 3])
    tokens, trained = parse_predictions(sampled, ENDED)
    assert tokens == [[[8, 9], [], [8], [], []]]
    assert trained.tolist() == [[3, 1, 2, 3, 0]]
    tokens, trained = parse_predictions(sampled, FORM)
    assert tokens == [[[8, 9, A], [A, 8, 9], [8, A, 9], [8, 9, 8], []]]
    assert trained.tolist() == [[3, 3, 3, 3, 0]]
    two = ThoughtFormat(before=(), after=(), open=(OPEN,), close=(CLOSE,), bos=None, pad=0, end=(A, 8))
    assert parse_predictions(sampled, two)[0] == [[[8, 9, A][:0], [], [], [], []]]


def test_thought_and_prediction_are_joined_and_nothing_else():
    sampled = responses([[8, A, 9], [8, 9, 8]], [True, False], [1, 3])
    whole = join(sampled, parse_predictions(sampled, ENDED)[1], ENDED.pad)
    assert whole.tokens.tolist() == [[[7, 8, A, 0, 0, 0], [7, 7, 7, 0, 0, 0]]]
    assert whole.mask.long().tolist() == [[[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]]]
    assert whole.logp.tolist() == [[[-1, -10, -20, 0, 0, 0], [-1, -2, -3, 0, 0, 0]]]


@pytest.mark.parametrize("form", [FORM, LONG], ids=["short", "long"])
@pytest.mark.parametrize("way", [(64, "shared"), (5, "shared"), (5, "replicated")])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_what_is_written_has_the_probability_of_plain_rows(form, way, temperature):
    rows, prefix = way
    model, options = qwen3(scale=0.2), settings(temperature=temperature, rows=rows, prefix=prefix, prediction_length=3)
    positions = at_positions(WINDOWS, [[1, 3], [2, 4, 5], [1], [2]], 1)
    noise, writing = (draw_noise((5, n), [make_generator(n, i) for i in range(len(positions))]) for n in (6, 3))
    writer = engine(model, options, form)
    found, thoughts = writer.sample(positions, noise, writing), writer.sample(positions, noise)
    for name in ("tokens", "mask", "closed", "hit"):
        assert torch.equal(getattr(found, name), getattr(thoughts, name)), name
    assert torch.allclose(found.evidence, thoughts.evidence, atol=1e-5)
    assert torch.allclose(found.logp, thoughts.logp, atol=1e-5)
    assert thoughts.written is None and found.written is not None and found.written_logp is not None
    assert thoughts.closed.any() or form is LONG
    for i, context in enumerate(positions.contexts()):
        for g in range(5):
            thought = thoughts.tokens[i, g][thoughts.mask[i, g]].tolist()
            ahead = [*form.prompt_tokens(context), *thought, *(() if thoughts.closed[i, g] else form.close)]
            tokens = found.written[i, g]
            logp = (plain_logits(model, [*ahead, *tokens.tolist()]) / temperature).log_softmax(-1)
            logp = logp[len(ahead) - 1 : -1]
            assert torch.allclose(found.written_logp[i, g], logp.gather(-1, tokens[:, None]).squeeze(-1), atol=1e-4)
            share = logp.detach().exp().double().cumsum(-1)
            for k, token in enumerate(tokens.tolist()):  # the token whose part of the unit interval the number is in
                low = float(share[k, token - 1]) if token else 0.0
                assert low - 1e-4 <= float(writing[i, g, k]) <= float(share[k, token]) + 1e-4


@pytest.mark.parametrize("prefix", ["shared", "replicated"])
@pytest.mark.parametrize(("form", "tokens"), [(FORM, 0), (FORM, 40), (ENDED, 0)])
def test_gradient_is_length_normalised_reinforce_of_all_that_was_sampled(prefix, form, tokens):
    model = biased({CLOSE: 2, A: 2})
    method = rpt(
        model,
        settings(tokens=tokens, prefix=prefix, prediction_length=2, positions=2, thought_length=3, reward="random"),
        form,
    )
    batch = collected(method, [window(5, 5, 5, 5), window(6, 5, 6, 5, 6), window(5, 6, 5)], step=1)
    total, rows, kinds = torch.zeros(()), 0, set()
    for piece in batch.microbatches:
        for advantage, (prompt, response) in zip(piece.advantage, written(piece, form), strict=True):
            total = total - advantage * plain_thought(model, prompt, response, 0.7, CLOSE).mean()
            rows += 1
            kinds.add((CLOSE in response[:3], len(response)))
    assert (False, 3) in kinds  # cut off: nothing behind it
    assert {length for closed, length in kinds if closed} <= {3, 4, 5}
    assert any(closed for closed, _ in kinds)
    assert_close(update(method, batch.microbatches), gradients(model, total / rows))
    gap, count = method.forward_backward(batch.microbatches[0])[1]["objective/mismatch"]
    assert gap / count < 1e-5


@pytest.mark.parametrize("form", [FORM, ENDED], ids=["fixed length", "with an end"])
def test_rewards_are_those_of_the_text(form):
    model = biased({A: 4, 9: 4, CLOSE: 3})
    method = rpt(model, settings(group=16, prediction_length=2, positions=3, thought_length=4), form)
    windows = [window(9, 5, 9, 5, 9, 5), window(10, 10, 10, 10, 10)]
    batch = collected(method, windows, step=1)
    right = seen = 0
    for piece in batch.microbatches:
        stops = [
            tuple(doc[:stop])
            for doc, some in zip(piece.batch.documents, piece.batch.prefix_lengths, strict=True)
            for stop in some
        ]
        values = []
        for place, (_, response) in zip(piece.batch.position_index.tolist(), written(piece, form), strict=True):
            context = stops[place]
            truth = next(one.tokens[len(context) :] for one in windows if tuple(one.tokens[: len(context)]) == context)
            closed = response.index(CLOSE) if CLOSE in response[:4] else None
            prediction = response[closed + 1 :] if closed is not None else []
            if form is ENDED:
                prediction = prediction[: prediction.index(A)] if A in prediction else []
            values.append(float(bool(prediction) and truth[: len(prediction)] == prediction))
        groups = torch.tensor(values).view(-1, 16)
        wanted = 16 / 15 * (groups - groups.mean(1, keepdim=True))
        assert torch.allclose(piece.advantage.view(-1, 16), wanted, atol=1e-6)
        right, seen = right + sum(values), seen + len(values)
    assert 0 < right < seen == 96
    assert batch.metrics["reward/match"] == batch.metrics["reward/mean"] == (right, seen)


def test_equal_rewards_give_exactly_no_gradient():
    """Nothing in the text can be written: every group is flat."""
    model = qwen3()
    method = rpt(model, settings())
    batch = collected(method, [window(5, 1, 1, 1)], step=1)
    assert batch.metrics["reward/match"][0] == 0
    assert batch.metrics["reward/zero_std_fraction"] == (1, 1)
    assert not any(slope.any() for slope in update(method, batch.microbatches))


def test_expected_gradient_over_all_that_can_be_sampled():
    """E[gradient] = -sum_o pi(o) (r(o) - E[r]) (1/|o|) grad log pi(o), o a thought with its prediction."""
    model, context, target = tiny(), [0, 2, 1], 2
    found = []
    for one in every_thought(model, [*context, OPEN], FORM, limit=2):
        if one.closed is not one.thought:  # cut off: no prediction
            found.append((one, 0.0))
            continue
        logits = plain_logits(model, [*context, OPEN, *one.thought])[-1].log_softmax(-1)
        for token in range(len(logits)):
            whole = [*one.thought, token]
            found.append(
                (Enumerated(whole, whole, torch.cat([one.logp, logits[token : token + 1]])), float(token == target))
            )
    every = [one for one, _ in found]
    chance = torch.stack([one.probability for one in every])
    rewards = torch.tensor([reward for _, reward in found], dtype=chance.dtype)
    lengths = torch.tensor([len(one.thought) for one in every])
    assert float(chance.sum().detach()) == pytest.approx(1, abs=1e-6)
    centred = rewards - (chance * rewards).sum().detach()
    logp = torch.stack([one.logp.sum() for one in every])
    exact = gradients(model, -(chance.detach() * centred / lengths * logp).sum())
    assert_close(expected_group_gradient(model, context, every, rewards), exact)


def test_random_rewards_know_nothing_of_the_text():
    model = qwen3(scale=0.1)
    one, other = (collected(rpt(model, settings(reward="random")), [window(5, x, 6, x)], 1) for x in (7, 8))
    assert one.microbatches[0].advantage.unique().numel() == 4
    assert torch.equal(one.microbatches[0].advantage, other.microbatches[0].advantage)
    assert one.metrics["reward/mean"][0] != one.metrics["reward/match"][0]


def no_think_entropy(model: Any, tokens: list[int]) -> torch.Tensor:
    """Of the next token at each position from 1 on."""
    logp = plain_logits(model, tokens)[:-1].detach().double().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("proxy", ["", "policy"])
def test_positions_are_those_where_the_proxy_is_unsure(proxy, tokens):
    """The start by default; the policy itself as it is after an update."""
    start, policy = qwen3(scale=0.5), qwen3(scale=0.5, seed=1)
    model = policy if proxy else start
    least = float(torch.cat([no_think_entropy(model, one.tokens) for one in WINDOWS]).median())
    options = settings(position_policy="entropy", min_entropy=least, proxy=proxy, positions=2, tokens=tokens)
    trained = copy.deepcopy(start)
    places = PositionSampler(Network(trained, "fp32"), None, FORM, word_tokenizer(), options)
    trained.load_state_dict(policy.state_dict())
    chosen: list[set[int]] = [set() for _ in WINDOWS]
    for step in range(60):
        positions = places.draw(WINDOWS, step)
        for owner, at in zip(positions.window.tolist(), positions.at.tolist(), strict=True):
            chosen[owner].add(at)
    for seen, one in zip(chosen, WINDOWS, strict=True):
        entropy = no_think_entropy(model, one.tokens)
        high = {t + 1 for t, value in enumerate(entropy.tolist()) if value >= least}
        best = {t + 1 for t in entropy.topk(min(2, len(entropy))).indices.tolist()}
        assert seen == (high if len(high) >= 2 else best)
    assert {len(seen) for seen in chosen} > {2}
    assert (places.proxy is trained) == (proxy == "policy")


def test_in_bf16_the_policy_that_computes_is_its_own_proxy():
    network = Network(qwen3(), "bf16")
    options = settings(position_policy="entropy", proxy="policy")
    assert PositionSampler(network, None, FORM, word_tokenizer(), options).proxy is network.model
    start = copy.deepcopy(network.weights)
    places = PositionSampler(network, start, FORM, word_tokenizer(), settings(position_policy="entropy"))
    assert places.proxy is start


@given(
    entropy=st.lists(st.floats(0, 3, width=32), min_size=1, max_size=9, unique=True),
    count=st.integers(1, 9),
    least=st.floats(0, 3),
)
def test_the_least_unsure_of_the_chosen(entropy, count, least):
    options = Method(min_entropy=least)
    places = uncertain(torch.tensor(entropy), count, options, make_generator(0))
    assert len(places) == len(set(places)) == min(count, len(entropy))
    values, others = [entropy[t - 1] for t in places], [x for t, x in enumerate(entropy, 1) if t not in places]
    if sum(value >= least for value in torch.tensor(entropy)) >= count:
        assert min(torch.tensor(values)) >= least
    else:
        assert min(values) >= max(others, default=0.0)


def test_high_entropy_positions_are_equally_likely():
    counts = torch.zeros(5)
    for seed in range(2000):
        for place in uncertain(
            torch.tensor([2.0, 0.5, 3.0, 1.5, 1.0]), 2, Method(min_entropy=1.0), make_generator(seed)
        ):
            counts[place - 1] += 1
    assert counts[1] == 0
    assert (counts[[0, 2, 3, 4]] - 1000).abs().max() < 100


def test_the_proxy_stays_what_the_start_was():
    model = qwen3(scale=0.5)
    places = PositionSampler(
        Network(model, "fp32"),
        None,
        FORM,
        word_tokenizer(),
        settings(position_policy="entropy", min_entropy=1.0, positions=2),
    )
    before = places.draw(WINDOWS, 1).at
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(places.draw(WINDOWS, 1).at, before)
    assert places.proxy is not None and places.proxy is not model
    assert not any(parameter.requires_grad for parameter in places.proxy.parameters())


def test_auto_is_what_each_paper_does_and_rlp_takes_entropy_too():
    assert [Method(name=name).policy for name in ("rlp", "rpt")] == ["uniform", "entropy"]
    assert Method(name="rpt", position_policy="marked").policy == "marked"
    same = [draw_positions(WINDOWS, Method(position_policy=name), make_generator(3)).at for name in ("auto", "uniform")]
    assert torch.equal(*same)


@pytest.mark.parametrize(("prediction_length", "proxy"), [(1, ""), (3, ""), (3, "policy")])
def test_a_real_step_equals_torchs_count(prediction_length, proxy):
    policy = biased({CLOSE: 1})
    policy.set_attn_implementation("eager")
    options = settings(
        tokens=1, rows=1, group=3, thought_length=4, prefix="replicated", prediction_length=prediction_length,
        position_policy="entropy", proxy=proxy, temperature=1.0,
    )  # fmt: skip
    method, windows = rpt(policy, options), [window(5, 6, 7, 8, 9, 5, 7), window(9, 10, 5, 7, 11, 6, 8)]
    with FlopCounterMode(display=False) as rollout:
        batch = collected(method, windows, 1)
    with FlopCounterMode(display=False) as backward:
        for piece in batch.microbatches:
            method.forward_backward(piece)
    work, shape = batch.work, Shape.of(policy.config)
    assert isinstance(work, Work)
    expected = rlp_step(shape, work, causal=False)
    assert {0, prediction_length} == {n for some in work.written for n in some}
    assert work.proxy == forward_flops(shape, [(6, 0), (6, 0)], 12) == expected.proxy
    seen = forward_flops(shape, [(6, 0), (6, 0)], 12, causal=False)
    assert counted(rollout) == expected.rollout - expected.proxy + seen
    assert counted(backward) == expected.training


@pytest.mark.parametrize("proxy", ["", "policy"])
def test_a_run_resumes_to_the_bit(proxy: str, tmp_path: Path):
    method = {"name": "rpt", "prediction_length": 2, "min_entropy": 3.0, "proxy": proxy}
    whole, run = (tmp_path / name for name in ("whole", "run"))
    train(from_dict(options(tmp_path, "whole", method=method)))
    stopped = Trainer(from_dict(options(tmp_path, "run", method=method)))
    log = RunLog.create(stopped.config)

    class Stopper(Callbacks):
        def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
            if step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), log.lock():
        stopped.run(log, Stopper())
    resume(run)
    assert_same_run(whole, run)
    assert {path.name for path in whole.glob("checkpoints/*/*.safetensors")} == {
        "policy.safetensors",
        "optimizer.safetensors",
    }


def test_the_embedded_base_trains_and_is_reported(tmp_path: Path):
    run = tmp_path / "run"
    words = ["--method.name", "rpt", "--train.steps", "2", "--train.batch", "8", "--evaluate.documents", "3"]
    assert main(["train", "quickstart", *words, "--run", str(run), "--model.device", "cpu"]) == 0
    rows = read_lines(run / "metrics.jsonl")
    assert all(0 <= row["reward/match"] <= 1 and row["reward/match"] == row["reward/mean"] for row in rows)
    assert all(row["objective/mismatch"] < 1e-5 and row["rollout/predicted"] > 0.9 for row in rows)
    for place in read_lines(run / "thoughts.jsonl"):
        for thought in place["thoughts"]:
            assert thought["reward"] == float(thought["prediction"] == place["target"])
    assert not list(run.glob("checkpoints/*/teacher.safetensors"))
    assert "wrote" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method.clamp_gain", "true"], "method.name = 'rpt': has no gain"),
        (["--method.min_gain", "0.1"], "method.name = 'rpt': has no gain"),
        (["--method.end", "."], "method.prediction_length = 1: must be above the 1 tokens of method.end = '.'"),
        (["--method.end", "§", "--method.prediction_length", "3"], "method.end = '§': the tokenizer cannot encode it"),
        (["--method.prediction_length", "0"], "method.prediction_length = 0: input should be greater than"),
        (["--method.min_entropy", "-1"], "method.min_entropy = -1"),
        (["--method.group", "1"], "method.group = 1: comparing thoughts takes at least 2"),
        (["--method.proxy", "embedded"], "method.proxy = 'embedded': only method.position_policy entropy"),
        (["--method.proxy", "policy", "--method.position_policy", "stride"], "method.proxy = 'policy': only method."),
        (["--method.proxy", "/no/such", "--method.position_policy", "entropy"], "method.proxy = '/no/such'"),
    ],
)
def test_bad_options_are_one_line(words, message, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "quickstart", "--method.name", "rpt", *words, "--run", str(tmp_path / "run")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_proxy_must_speak_the_same_tokens(tmp_path: Path):
    values = options(tmp_path, "run", method={"name": "rpt", "proxy": str(EMBEDDED["embedded"])})
    trainer = Trainer(from_dict(values))
    assert isinstance(trainer.method, RPT)
    proxy: Any = trainer.method.position_sampler.proxy
    assert proxy.config.hidden_size != trainer.policy.config.hidden_size
    assert trainer.method.position_sampler.flops([window(5, 6, 7)]) > 0
    folder = tmp_path / "other"
    proxy.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match=r"^method.proxy = .*other': has another tokenizer than the model"):
        Trainer(from_dict(options(tmp_path, "run", method={"name": "rpt", "proxy": str(folder)})))
