"""The vLLM engine without vLLM: its requests, what becomes of their samples, and the distribution of thoughts."""

import dataclasses
import itertools
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from forethought.config import Config, RunError, UserError
from forethought.data.positions import at_positions, make_generator
from forethought.data.token_bytes import Closing
from forethought.rollout import draw_noise, rescored, thought_tokens
from forethought.rollout.native import NativeEngine
from forethought.rollout.vllm import (
    Caller,
    Draw,
    Request,
    Sample,
    as_thoughts,
    closed,
    difference,
    seed,
    start,
    think,
)
from helpers.models import FORM, LONG, WINDOWS, config, qwen3

NINE, PAIR = Closing.of_tokens((9,)), Closing.of_tokens((8, 9))
NOISE = draw_noise((2, 5), [make_generator(0, i) for i in range(2)])


def scripted(*turns: list[list[list[int]]]) -> tuple[Draw, list[list[Request]]]:
    """An engine that returns these tokens, turn by turn, and the requests that it received."""
    requested: list[list[Request]] = []

    def draw(requests: list[Request]) -> list[list[Sample]]:
        requested.append(requests)
        answers = turns[len(requested) - 1]
        return [[Sample(tokens=some, logp=[-float(t) for t in some]) for some in group] for group in answers]

    return draw, requested


def test_one_request_a_position_is_enough_for_a_delimiter_of_one_token():
    draw, requested = scripted([[[5, 9], [5, 5, 5, 5, 5]], [[6, 7, 9], [5, 6, 7, 8, 9]]])
    rows = think([[1, 2], [3]], NOISE, NINE, draw)
    assert [(one.prompt, one.samples, one.limit, one.stops, one.shortest) for one in requested[0]] == [
        ([1, 2], 2, 5, [9], 1),
        ([3], 2, 5, [9], 1),
    ]
    assert len(requested) == 1
    assert [closed(row, NINE) for row in rows] == [True, False, True, True]


def test_a_delimiter_of_several_tokens_is_awaited_thought_by_thought():
    first = [[[5, 8], [5, 5, 5, 5, 5]], [[6, 8], [6, 7, 8]]]
    draw, requested = scripted(first, [[[9]], [[7, 9]], [[7, 6]]], [[[5]]])
    rows = think([[1, 2], [3]], NOISE, PAIR, draw)
    assert [row.tokens for row in rows] == [[5, 8, 9], [5, 5, 5, 5, 5], [6, 8, 7, 9, 5], [6, 7, 8, 7, 6]]
    assert [row.logp for row in rows][2] == [-6, -8, -7, -9, -5]
    assert [closed(row, PAIR) for row in rows] == [True, False, False, False]
    assert [(one.prompt, one.samples, one.limit, one.stops, one.shortest) for one in requested[1]] == [
        ([1, 2, 5, 8], 1, 3, [9], 0),
        ([3, 6, 8], 1, 3, [9], 0),
        ([3, 6, 7, 8], 1, 2, [9], 0),
    ]
    assert [one.prompt for one in requested[2]] == [[3, 6, 8, 7, 9]]
    seeds = [one.seed for some in requested for one in some]
    assert len(set(seeds)) == len(seeds)


def test_seeds_are_a_function_of_the_noise():
    again = draw_noise((2, 5), [make_generator(0, i) for i in range(2)])
    assert [seed(one) for one in NOISE] == [seed(one) for one in again]
    found = [seed(one, turn) for one in [*NOISE, *NOISE.flatten(0, 1)] for turn in (0, 1)]
    assert len(set(found)) == len(found)
    assert all(0 <= one < 2**62 for one in found)


def markov(requests: list[Request]) -> list[list[Sample]]:
    """Samples of a chain over four tokens, by the rules that a request states."""
    found = []
    for request in requests:
        draw, group = torch.Generator().manual_seed(request.seed), []
        for _ in range(request.samples):
            tokens: list[int] = []
            while len(tokens) < request.limit and not (tokens and tokens[-1] in request.stops):
                row = CHAIN[[*request.prompt, *tokens][-1]].clone()
                if len(tokens) < request.shortest:
                    row[request.stops] = 0
                tokens.append(int(torch.multinomial(row, 1, generator=draw)))
            group.append(Sample(tokens=tokens, logp=[0.0] * len(tokens)))
        found.append(group)
    return found


CHAIN = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.3, 0.1, 0.4, 0.2], [0.2, 0.3, 0.1, 0.4], [0.4, 0.1, 0.4, 0.1]])


@pytest.mark.parametrize("shortest", [0, 1, 2])
@pytest.mark.parametrize("close", [(2,), (2, 3), (3, 3), (2, 3, 2)])
def test_thoughts_by_requests_have_the_distribution_of_the_definition(close: tuple[int, ...], shortest: int):
    """Every thought of up to four tokens: sampled shares against probabilities, by chi-square at 5 sigma."""
    limit, count, exact = 4, 4000, Counter[tuple[int, ...]]()
    early = {close[0]} if shortest < 2 else {close[0], close[-1]}
    for tokens in itertools.product(range(4), repeat=limit):
        p = 1.0
        for at, (a, b) in enumerate(itertools.pairwise((1, *tokens))):
            allowed = [token for token in range(4) if at >= shortest or token not in early]
            p *= float(CHAIN[a][b] / CHAIN[a][allowed].sum()) if b in allowed else 0.0
        if not p:
            continue
        ends = [n for n in range(len(close), limit + 1) if tokens[n - len(close) : n] == close]
        exact[tokens[: ends[0]] if ends else tokens] += p
    assert sum(exact.values()) == pytest.approx(1, abs=1e-6)
    noise = draw_noise((count, limit), [make_generator(1)])
    seen = Counter(
        tuple(row.tokens) for row in think([[0, 1]], noise, Closing.of_tokens(close).with_minimum(shortest), markov)
    )
    assert set(seen) <= set(exact)
    chi = sum((seen[some] - count * p) ** 2 / (count * p) for some, p in exact.items())
    freedom = len(exact) - 1
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)


TEXTS = ("x", "]", "].", "a]", "")
"""Of four tokens, and of those beyond."""


def test_thoughts_by_requests_close_by_their_text():
    """Every thought of up to four tokens ends with the first token that holds the delimiter, and begins with none."""
    closing, limit, count, exact = Closing(TEXTS, "]", (1,)), 4, 4000, Counter[tuple[int, ...]]()
    first = torch.tensor([1.0, 0, 0, 0])
    for tokens in itertools.product(range(4), repeat=limit):
        p = float(first[tokens[0]]) * math.prod(float(CHAIN[a][b]) for a, b in itertools.pairwise(tokens))
        ends = [n for n in range(2, limit + 1) if "]" in "".join(TEXTS[token] for token in tokens[:n])]
        exact[tokens[: ends[0]] if ends else tokens] += p
    noise = draw_noise((count, limit), [make_generator(1)])
    rows = think([[0, 1]], noise, closing, markov)
    seen = Counter(tuple(row.tokens) for row in rows)
    kept = {some: p for some, p in exact.items() if p}
    assert set(seen) <= set(kept)
    chi = sum((seen[some] - count * p) ** 2 / (count * p) for some, p in kept.items())
    assert abs(chi - len(kept) + 1) < 5 * math.sqrt(2 * (len(kept) - 1))
    form = dataclasses.replace(FORM, close=(1,), closing=closing)
    (contents,) = thought_tokens(as_thoughts(rows, form, (1, 1), torch.device("cpu")), form)
    assert all(1 not in content and 2 not in content for content in contents)


def test_samples_become_thoughts():
    rows = [Sample(tokens=tokens, logp=[-1.0] * len(tokens)) for tokens in ([5, 4], [5, 6, 7], [6, 5, 4], [5])]
    thoughts = as_thoughts(rows, FORM, (2, 3), torch.device("cpu"))
    assert thoughts.evidence.shape == thoughts.hit.shape == (2, 2, 3)
    assert thought_tokens(thoughts, FORM) == [[[5], [5, 6, 7]], [[6, 5], [5]]]
    assert thoughts.tokens.tolist() == [[[5, 4, 0], [5, 6, 7]], [[6, 5, 4], [5, 0, 0]]]
    assert thoughts.lengths.tolist() == [[2, 3], [3, 1]]
    assert thoughts.closed.tolist() == [[True, False], [True, False]]
    assert thoughts.logp.tolist() == (-1.0 * thoughts.mask).tolist()


@pytest.mark.parametrize("form", [FORM, LONG], ids=["short", "long"])
@pytest.mark.parametrize(("shared", "tokens"), [(True, 10**6), (True, 20), (False, 30)])
def test_evidence_scored_by_the_policy_is_that_of_the_native_engine(form, shared: bool, tokens: int):
    model, prefix = qwen3(scale=0.2), "shared" if shared else "replicated"
    settings = config(tokens=tokens, prefix=prefix, thought_length=6, horizon=2)
    positions = at_positions(WINDOWS, [[1, 3], [2, 4, 5], [1], [2]], horizon=2)
    noise = draw_noise((4, 6), [make_generator(0, i) for i in range(len(positions))])
    wanted = NativeEngine(model, form, settings.method, shared=shared).sample(positions, noise)
    blank = dataclasses.replace(wanted, evidence=torch.zeros_like(wanted.evidence), hit=~wanted.hit)
    found = rescored(blank, positions, model, form, settings)
    assert torch.allclose(found.evidence, wanted.evidence, atol=1e-5)
    assert torch.equal(found.hit, wanted.hit)
    assert 0 < wanted.hit.float().mean() < 1


def test_a_probe_detects_other_weights_and_weights_that_were_not_loaded():
    policy = torch.tensor([-1.0, -2.0, -3.0])
    near, far = policy + 1e-5, policy + torch.tensor([0.0, 0.5, 0.0])
    assert difference((policy, near), None, 1e-3) == ""
    assert "differs from the policy by 0.17 nats" in difference((policy, far), None, 1e-3)
    assert "differs from the policy by nan" in difference((policy, near * math.nan), None, 1e-3)
    moved = policy + 5e-4
    assert difference((moved, moved + 1e-5), (policy, near), 1e-3) == ""
    assert "were not loaded: the policy moved by 0.0005 nats" in difference((moved, near), (policy, near), 1e-3)
    assert difference((policy + 1e-6, near), (policy, near), 1e-3) == ""


def fails() -> None:
    raise ValueError("no\nroom")


def test_an_engine_that_fails_is_one_line():
    caller = Caller(60.0)
    with pytest.raises(RunError, match=r"^rollout.engine = 'vllm': sampling failed with ValueError: no room; the last"):
        caller.call("sampling", fails)
    assert caller.call("sampling", lambda: 3) == 3


def test_an_engine_that_hangs_is_one_line_and_is_not_called_again():
    caller, ended = Caller(0.05), threading.Event()
    with pytest.raises(
        RunError, match=r"^rollout.engine = 'vllm': sampling takes longer than rollout.timeout_s = 0.05"
    ):
        caller.call("sampling", ended.wait)
    with pytest.raises(RunError, match=r"sampling has not ended, so loading the new weights cannot begin"):
        caller.call("loading the new weights", lambda: 3)
    assert not ended.is_set()
    ended.set()


def test_a_missing_vllm_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    wanted: Callable[..., object] = start
    with pytest.raises(UserError, match=r"^rollout.engine = 'vllm': vLLM cannot be imported \(.*\); docs/vllm.md"):
        wanted(qwen3(), FORM, Config())
