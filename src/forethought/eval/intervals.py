"""Bootstrap intervals of ratios of sums, over documents and, where there are several, over seeds.

Positions of one document are not independent, so whole documents are drawn with replacement. Seeds of an arm share the
documents: in each resample seeds are drawn, and apart from them one set of documents for all of them (a crossed, or
pigeonhole, bootstrap; A. B. Owen, 2007). Drawing documents for each seed anew would average away what they share.
With few seeds their spread is itself poorly known, and the interval is too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000

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

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The paired difference: resample by resample."""
        return Estimate(value=self.value - other.value, draws=self.draws - other.draws)

    def interval(self) -> tuple[float, float]:
        """The 95 % percentile interval."""
        low, high = np.nanquantile(self.draws, [0.025, 0.975])
        return float(low), float(high)


def resample(document: Sequence[int], seeds: int = 1) -> Resamples:
    """Draw for positions that belong to these documents; the same numbers on every call."""
    names, owner = np.unique(np.asarray(document), return_inverse=True)
    picks = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    drawn = np.random.default_rng(1).integers(seeds, size=(RESAMPLES, seeds))
    return Resamples(owner=owner, documents=_counts(picks), seeds=_counts(drawn) / seeds)


def estimate(ratios: Sequence[Ratio], drawn: Resamples) -> Estimate | None:
    """Mean over seeds of each seed's sum / sum.

    None where a denominator is not surely above zero (its 95 % interval reaches 0): there is nothing to be a share of.
    """
    values, draws = [], []
    for top, bottom in ratios:
        above, below = (np.bincount(drawn.owner, weights=part) for part in (top, bottom))
        totals = drawn.documents @ below
        if below.sum() <= 0 or np.quantile(totals, 0.025) <= 0:
            return None
        values.append(above.sum() / below.sum())
        nothing = np.full(RESAMPLES, np.nan)
        draws.append(np.divide(drawn.documents @ above, totals, out=nothing, where=totals > 0))
    return Estimate(value=float(np.mean(values)), draws=(drawn.seeds * np.array(draws).T).sum(axis=1))


def _counts(picks: np.ndarray) -> np.ndarray:
    """How often each index occurs in each row of a (rows, size) array of indices below size."""
    rows, size = picks.shape
    flat = np.bincount((picks + size * np.arange(rows)[:, None]).ravel(), minlength=rows * size)
    return flat.reshape(rows, size).astype(float)
