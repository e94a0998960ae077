"""Ratios, pairs and seeds: by hand, and as wide as theory says."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forethought.config import UserError
from forethought.eval import heldout
from forethought.eval.intervals import RESAMPLES, estimate, resample, student_t
from helpers.heldout import records


def width(figures: dict[str, float], metric: str) -> float:
    return figures[f"all/{metric}/high"] - figures[f"all/{metric}/low"]


def noisy(size: int, shift: float = 0.0) -> heldout.Records:
    rng = random.Random(0)
    think = [shift - 2 + rng.gauss(0, 1) for _ in range(size)]
    return records(list(range(size)), think, [-1.0] * size)


def pooled(seeds: list[heldout.Records]) -> dict[str, float]:
    return heldout.figures(heldout.drawn_together([{"all": one} for one in seeds], [{"all": one} for one in seeds]))


def paired(ours: list[dict[str, heldout.Records]], theirs: list[dict[str, heldout.Records]]) -> dict[str, float]:
    """Both with the same base, which is theirs."""
    bases = [mine | other for mine, other in zip(ours, theirs, strict=True)]
    return heldout.differences(heldout.drawn_together(ours, bases), heldout.drawn_together(theirs, bases))


def test_documents_are_drawn_as_often_as_there_are_of_them():
    drawn = resample([4, 4, 7, 9], seeds=3)
    assert drawn.owner.tolist() == [0, 0, 1, 2]
    assert drawn.documents.shape == (RESAMPLES, 3) and (drawn.documents.sum(axis=1) == 3).all()
    assert drawn.documents.mean(axis=0) == pytest.approx([1, 1, 1], abs=0.1)
    assert drawn.seeds.shape == (RESAMPLES, 3) and drawn.seeds.sum(axis=1) == pytest.approx(1)
    assert set(drawn.seeds.ravel().round(3)) == {0, 0.333, 0.667, 1}


def test_a_figure_is_the_ratio_of_sums_and_not_the_mean_of_ratios():
    one = estimate([(np.array([1.0, 2.0, 1.0]), np.array([1.0, 8.0, 1.0]))], resample([0, 1, 1]))
    assert one is not None and one.value == 0.4
    assert set(one.draws.round(4)) == {1, 0.4, 0.3333}


@pytest.mark.parametrize("bottom", [[0.0] * 20, [1.0] + [-1.0] * 19, [2.0] + [0.0] * 19])
def test_a_ratio_to_what_may_be_nothing_is_left_out(bottom: list[float]):
    top = np.ones(20)
    assert estimate([(top, np.array(bottom))], resample(list(range(20)))) is None
    assert estimate([(top, top), (top, np.array(bottom))], resample(list(range(20)), 2)) is None


def test_resamples_without_a_denominator_do_not_count():
    bottom = np.array([1.0] * 4 + [0.0] * 8)  # (8/12)^12 of all resamples have none
    one = estimate([(bottom / 2, bottom)], resample(list(range(12))))
    assert one is not None and one.value == 0.5
    assert set(one.draws[np.isfinite(one.draws)]) == {0.5} and np.isnan(one.draws).any()


def test_one_seed_pooled_is_the_plain_summary():
    one = noisy(30)
    assert pooled([one]) == heldout.summarize({"all": one}, {"all": one})


def test_pooling_takes_the_mean_over_seeds_and_widens_by_their_spread():
    alone, same = pooled([noisy(40)]), pooled([noisy(40)] * 3)
    apart = pooled([noisy(40, shift) for shift in (-3.0, 0.0, 3.0)])
    assert apart["all/ce_think"] == pytest.approx(alone["all/ce_think"])
    # Seeds share the documents: three seeds that agree know no more than one does.
    assert width(same, "ce_think") == pytest.approx(width(alone, "ce_think"))
    # Means of three draws of (-3, 0, 3): standard deviation sqrt(6 / 3), 95 % of them within +-2 to 3.
    assert 4 < width(apart, "ce_think") < 7
    assert apart["all/positions"] == apart["all/documents"] == 40


def test_each_seed_is_compared_with_its_own_base():
    seeds = [records([0, 1], [-1.0, -1.0], [-2.0, -2.0]), records([0, 1], [-3.0, -3.0], [-2.0, -2.0])]
    bases = [records([0, 1], [-9.0, -9.0], [-2.0, -2.0]), records([0, 1], [-9.0, -9.0], [-8.0, -8.0])]
    figures = heldout.figures(heldout.drawn_together([{"all": one} for one in seeds], [{"all": one} for one in bases]))
    assert figures["all/gain_over_base"] == 3.0  # (1 + 5) / 2
    assert figures["all/drift"] == -3.0  # (0 - 6) / 2


def test_a_paired_interval_is_that_of_the_difference():
    """Two models that differ by 0.1 on documents of very unequal difficulty are told apart, but not side by side."""
    rng = random.Random(3)
    hard = [rng.gauss(-5, 3) for _ in range(50)]
    one = records(list(range(50)), hard, hard)
    better = records(list(range(50)), [x + 0.1 + rng.gauss(0, 0.01) for x in hard], hard)
    pair = paired([{"all": better}], [{"all": one}])
    assert pair["all/ce_think"] == pytest.approx(-0.1, abs=0.01)
    assert -0.11 < pair["all/ce_think/low"] < pair["all/ce_think/high"] < -0.09
    assert pair["all/ce_nothink"] == pair["all/ce_nothink/low"] == pair["all/ce_nothink/high"] == 0
    assert width(pooled([one]), "ce_think") > 1 > 20 * width(pair, "ce_think")
    assert pair["all/gain_over_base"] == pytest.approx(-pair["all/ce_think"])
    assert pair["all/gain_over_base/low"] == pytest.approx(-pair["all/ce_think/high"])
    assert pair["all/drift"] == pair["all/plain_gain_over_base"] == 0


@given(st.lists(st.floats(-9, 0), min_size=10, max_size=16))
def test_differences_turn_their_sign_with_the_order(values: list[float]):
    documents = list(range(len(values)))
    one, other = records(documents, values, values), records(documents, values[::-1], values)
    there, back = paired([{"all": one}], [{"all": other}]), paired([{"all": other}], [{"all": one}])
    assert there["all/ce_think"] == pytest.approx(-back["all/ce_think"])
    assert there["all/ce_think/low"] == pytest.approx(-back["all/ce_think/high"])


def test_pairs_of_seeds_are_drawn_together():
    """Seeds that differ much, while one arm is better by 0.5 on every one of them."""
    ours = [{"all": noisy(30, shift)} for shift in (-3.5, 0.5, 4.5)]
    theirs = [{"all": noisy(30, shift)} for shift in (-4.0, 0.0, 4.0)]
    pair = paired(ours, theirs)
    assert pair["all/ce_think"] == pytest.approx(-0.5)
    assert width(pair, "ce_think") == pytest.approx(0, abs=1e-9)


def test_records_of_other_positions_or_another_text_are_refused():
    one = dataclasses.replace(records([0, 1], [-1.0, -1.0], [-1.0, -1.0]), text=[7, 8])
    for call in (lambda one, other: paired([one], [other]), heldout.summarize):
        for other in ({"at": [1, 3]}, {"text": [7, 9]}):
            with pytest.raises(UserError, match="same positions"):
                call({"all": one}, {"all": dataclasses.replace(one, **other)})


def test_what_only_one_of_two_measured_is_not_compared():
    one = records([0, 1], [-1.0, -1.0], [-1.0, -1.0])
    full, plain = {"all": dataclasses.replace(one, empty=[-1.0, -2.0])}, {"all": one}
    assert "all/ce_empty" not in paired([full], [plain])
    assert paired([full], [full])["all/ce_empty"] == 0
    assert paired([{"answer": one, **plain}], [plain]).keys() == paired([plain], [plain]).keys()


def test_the_new_figures_by_hand():
    mine = dataclasses.replace(
        records([0, 1], think=[-1.0, -2.0], nothink=[-2.0, -4.0]),
        marginal=[-0.5, -1.5],
        teacher=[-3.0, -3.0],
        leakage=[1.0, 0.5],
        right=[1.0, 2.0],
        stated=[1.0, 4.0],
        empty=[-2.0, -5.0],
        shuffled=[-2.0, -3.5],
        random=[-3.0, -6.0],
    )
    figures = heldout.summarize({"all": mine}, {"all": mine})
    expected = {
        "marginal": 1.0,
        "gain_over_teacher": 1.5,
        "leakage": 0.75,
        "truth": 0.6,
        "checkable": 2.5,
        "ce_empty": 3.5,
        "gain_empty": -0.5,
        "ce_shuffled": 2.75,
        "gain_shuffled": 0.25,
        "ce_random": 4.5,
        "gain_random": -1.5,
        "gain_over_empty": 2.0,
        "gain_over_shuffled": 1.25,
        "gain_over_random": 3.0,
        "kept_shuffled": 0.5 / 3,
    }
    assert {name: figures.get(f"all/{name}") for name in expected} == pytest.approx(expected)
    plain = records([0, 1], think=[-1.0, -2.0], nothink=[-2.0, -4.0])
    always = {"marginal", "leakage"}
    assert (
        not {f"all/{name}" for name in expected.keys() - always}
        & heldout.summarize({"all": plain}, {"all": plain}).keys()
    )


def at_top(one: heldout.Records, entropy: list[float], percent: int) -> float:
    """Brute force: the mean gain where the entropy is highest; of equal ones the first."""
    ranked = sorted(range(len(entropy)), key=lambda i: (-entropy[i], i))
    count = next(n for n in range(1, len(entropy) + 1) if 100 * n >= percent * len(entropy))
    return sum(one.think[i] - one.nothink[i] for i in ranked[:count]) / count


@pytest.mark.parametrize("size", [30, 63, 100])
def test_the_gain_where_only_uncertain_positions_think(size: int):
    """Each seed has positions of its own; half of the entropies are equal."""
    rng, seeds = random.Random(size), []
    for _ in range(2):
        entropy = [rng.choice((0.5, 1.0, rng.random())) for _ in range(size)]
        think, nothink = ([rng.gauss(-2, 1) for _ in range(size)] for _ in range(2))
        one = records([i // 2 for i in range(size)], think, nothink)
        seeds.append(dataclasses.replace(one, entropy=entropy))
    alone = heldout.summarize({"all": seeds[0]}, {"all": seeds[0]})
    both = pooled(seeds)
    found = [name for name in alone if name.startswith("all/gain_self_top") and name.count("/") == 1]
    shares = (5, 10, 25, 50, 75, 100)
    enough = [share for share in shares if f"all/gain_self_top_{share}" in found]
    assert enough == list(shares if size == 100 else shares[-len(enough) :]) and len(enough) >= 4
    for share in enough:
        name = f"all/gain_self_top_{share}"
        wanted = [at_top(one, one.entropy, share) for one in seeds]
        assert alone[name] == pytest.approx(wanted[0])
        assert both[name] == pytest.approx(sum(wanted) / 2)
    for name in ("all/gain_self_top_50", "all/gain_self_top_100"):
        assert alone[f"{name}/low"] < alone[name] < alone[f"{name}/high"]
    assert [both[f"all/gain_self_top_100{end}"] for end in ("", "/low", "/high")] == pytest.approx(
        [both[f"all/gain_self{end}"] for end in ("", "/low", "/high")]
    )


def test_shares_of_too_few_documents_have_no_gain_at_the_top():
    one = dataclasses.replace(records([0, 0, 1, 1], [-1.0] * 4, [-2.0] * 4), entropy=[1.0, 2.0, 3.0, 4.0])
    figures = heldout.summarize({"all": one}, {"all": one})
    assert {name for name in figures if "top" in name} == {"all/gain_self_top_75", "all/gain_self_top_100"}


def test_targets_without_text_do_not_count_as_leaked():
    one = records([0, 0, 1, 1], [-1.0] * 4, [-1.0] * 4)
    half = dataclasses.replace(one, leakage=[1.0, None, 0.5, None])
    assert heldout.summarize({"all": half}, {"all": half})["all/leakage"] == 0.75
    # Half of the documents know of none: a quarter of all resamples has nothing to count.
    poor = dataclasses.replace(one, leakage=[1.0, None, None, None])
    assert "all/leakage" not in heldout.summarize({"all": poor}, {"all": poor})


@pytest.mark.parametrize("think", [[-2.0, -2.0], [-2.0, -2.1], [-2.5, -1.0]])
def test_where_there_is_no_sure_gain_none_is_kept(think: list[float]):
    one = dataclasses.replace(records([0, 1], think, [-2.0, -2.0]), shuffled=[-2.0, -2.0])
    figures = heldout.summarize({"all": one}, {"all": one})
    assert "all/kept_shuffled" not in figures and figures["all/gain_shuffled"] == 0
    sure = dataclasses.replace(one, think=[-1.0, -1.0])
    assert heldout.summarize({"all": sure}, {"all": sure})["all/kept_shuffled"] == 0


def sample(kind: str, documents: int, rng: np.random.Generator) -> tuple[float, np.ndarray, np.ndarray, list[int]]:
    """The true figure, values at the positions of some documents that differ in difficulty and length, their owners."""
    sizes = rng.integers(1, 6, size=documents)
    owner = np.repeat(np.arange(documents), sizes)
    if kind == "gain":  # nats
        truth, values = 0.0, rng.normal(size=documents)[owner] + rng.normal(size=len(owner))
    elif kind == "heavy":
        truth, values = 0.0, rng.standard_t(3, size=documents)[owner] + rng.standard_t(3, size=len(owner))
    else:
        truth, values = 0.3, rng.binomial(1, rng.beta(0.6, 1.4, size=documents)[owner]).astype(float)
    return truth, values, np.ones(len(owner)), owner.tolist()


@pytest.mark.parametrize("kind", ["gain", "heavy", "share"])
@pytest.mark.parametrize("documents", [10, 18, 40])
def test_intervals_cover_the_truth(kind: str, documents: int):
    """In 800 worlds; 0.93 less three standard errors of the simulation (0.009)."""
    rng, hits, count = np.random.default_rng(documents), 0, 800
    for _ in range(count):
        truth, top, bottom, owner = sample(kind, documents, rng)
        order = rng.permutation(documents)  # or the same documents would be drawn in every world
        one = estimate([(top, bottom)], resample(order[owner].tolist()), (0.0, 1.0) if kind == "share" else None)
        low, high = one.interval() or (0.0, 0.0) if one else (0.0, 0.0)
        hits += low <= truth <= high
    assert hits / count > 0.93 - 3 * 0.009, hits / count


@pytest.mark.parametrize("documents", [1, 2, 5, 9])
def test_few_documents_have_no_interval(documents: int):
    figures = pooled([noisy(documents)])
    assert "all/ce_think" in figures and "all/ce_think/low" not in figures
    assert figures["all/documents"] == documents
    assert "all/ce_think" in paired([{"all": noisy(documents)}], [{"all": noisy(documents)}])
    assert not any(name.endswith(("/low", "/high")) for name in figures)


def test_documents_that_a_ratio_does_not_depend_on_do_not_count():
    """4 of 12 documents have something to be a share of; 12 of 16 are enough."""
    for known, documents, enough in ((4, 12, False), (12, 16, True)):
        bottom = np.array([1.0] * known + [0.0] * (documents - known))
        one = estimate([(bottom / 2, bottom)], resample(list(range(documents))))
        assert one is not None and one.clusters == known
        assert (one.interval() is not None) == enough


def test_a_share_at_its_boundary_has_wilsons_bound():
    """0 of 18, 18 of 18, and the difference of two that are both 0."""
    none = dataclasses.replace(noisy(18), think_hit=[0.0] * 18, nothink_hit=[True] * 18)
    figures = pooled([none])
    bound = 1.96**2 / (18 + 1.96**2)
    assert figures["all/accuracy_think/low"] == 0
    assert figures["all/accuracy_think/high"] == pytest.approx(bound, abs=1e-4)
    assert figures["all/accuracy_nothink/low"] == pytest.approx(1 - bound, abs=1e-4)
    assert figures["all/accuracy_nothink/high"] == 1
    pair = paired([{"all": none}], [{"all": none}])
    assert pair["all/accuracy_think/high"] == -pair["all/accuracy_think/low"] == pytest.approx(bound, abs=1e-4)
    assert pair["all/ce_think/low"] == pair["all/ce_think/high"] == 0


@pytest.mark.parametrize(("freedom", "quantile"), [(9, 2.262), (17, 2.110), (39, 2.023), (199, 1.972)])
def test_students_t(freedom: int, quantile: float):
    assert student_t(freedom) == pytest.approx(quantile, abs=1e-3)
