"""Bootstrap intervals of ratios of sums, over documents and, where there are several, over seeds.

Positions of one document are not independent, so whole documents are drawn with replacement. Seeds of an arm share the
documents: in each resample seeds are drawn, and apart from them one set of documents for all of them (a crossed, or
pigeonhole, bootstrap; A. B. Owen, 2007). Drawing documents for each seed anew would average away what they share.
With few seeds their spread is itself poorly known, and the interval is too narrow.

Percentiles of resamples are too close together where documents are few. So an interval goes as far as the expanded
percentile interval (T. C. Hesterberg, What Teachers Should Know about the Bootstrap, 2015) and Student's t interval do,
whichever is farther. Its coverage is at least 0.93 from 10 documents on, and somewhat less for strongly skewed data
(benchmarks/intervals.py); below 10 there is no interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 1000
MIN_CLUSTERS = 10
"""Documents below which a figure has no interval."""
_Z = NormalDist().inv_cdf(0.975)

Limits = tuple[float, float] | None
Ratio = tuple[np.ndarray, np.ndarray]
"""Numerator and denominator at each position. The figure is sum / sum: for a plain mean the denominators are ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resamples:
    """What is drawn: the same for every metric and model measured at the same positions, so differences are paired."""

    owner: np.ndarray  # (positions): index of each one's document
    documents: np.ndarray  # (RESAMPLES, documents): how often each was drawn
    seeds: np.ndarray  # (RESAMPLES, seeds): share of each seed; a row adds up to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure and its value in each resample; NaN where a resample has none."""

    value: float
    draws: np.ndarray
    clusters: int  # documents that it depends on
    limits: Limits = None  # of a share: 0 and 1

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The paired difference: resample by resample."""
        return Estimate(
            value=self.value - other.value,
            draws=self.draws - other.draws,
            clusters=min(self.clusters, other.clusters),
            limits=self.limits and other.limits and (-1.0, 1.0),
        )

    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval; None below `MIN_CLUSTERS` documents.

        A share that is the same in all resamples, such as 0 of 18, gets Wilson's bound for as many trials as documents.
        """
        if (n := self.clusters) < MIN_CLUSTERS:
            return None
        if self.limits and np.nanmin(self.draws) == np.nanmax(self.draws):
            reach, (least, most) = _Z**2 / (n + _Z**2), self.limits
            return max(least, self.value - reach), min(most, self.value + reach)
        far = np.sqrt(n / (n - 1)) * student_t(n - 1)  # in standard deviations
        tail, reach = NormalDist().cdf(-far), far * np.nanstd(self.draws)
        low, high = np.nanquantile(self.draws, [tail, 1 - tail])
        least, most = self.limits or (-np.inf, np.inf)
        return float(max(least, min(low, self.value - reach))), float(min(most, max(high, self.value + reach)))


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t to three digits, from 9 degrees of freedom on (Fisher's expansion)."""
    z, n = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def resample(document: Sequence[int], seeds: int = 1) -> Resamples:
    """Draw for positions that belong to these documents; the same numbers on every call."""
    names, owner = np.unique(np.asarray(document), return_inverse=True)
    picks = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    drawn = np.random.default_rng(1).integers(seeds, size=(RESAMPLES, seeds))
    times, shares = (
        np.apply_along_axis(np.bincount, 1, some, minlength=some.shape[1]).astype(float) for some in (picks, drawn)
    )
    return Resamples(owner=owner, documents=times, seeds=shares / seeds)


def estimate(ratios: Sequence[Ratio], drawn: Resamples, limits: Limits = None) -> Estimate | None:
    """Mean over seeds of each seed's sum / sum.

    None where a denominator is not surely above zero (its 95 % interval reaches 0): there is nothing to be a share of.
    """
    values, draws, counted = [], [], np.zeros(drawn.documents.shape[1], dtype=bool)
    for top, bottom in ratios:
        above, below = (np.bincount(drawn.owner, weights=part) for part in (top, bottom))
        totals = drawn.documents @ below
        if below.sum() <= 0 or np.quantile(totals, 0.025) <= 0:
            return None
        counted |= (above != 0) | (below != 0)
        values.append(above.sum() / below.sum())
        nothing = np.full(RESAMPLES, np.nan)
        draws.append(np.divide(drawn.documents @ above, totals, out=nothing, where=totals > 0))
    together = (drawn.seeds * np.array(draws).T).sum(axis=1)
    return Estimate(value=float(np.mean(values)), draws=together, clusters=int(counted.sum()), limits=limits)
