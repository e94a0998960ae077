"""How often the 95 % interval of a figure contains the truth, by the kind of data and the number of documents.

    python benchmarks/intervals.py [--worlds 2000] [--documents 2 5 10 18 40]

Each world has documents with 1 to 5 positions each. `percentile` is the plain percentile interval of its resamples.
"""

import argparse
from collections.abc import Callable

import numpy as np

from forethought.eval.intervals import estimate, resample

RNG = np.random.default_rng(0)
Draw = Callable[[int, np.ndarray], np.ndarray]  # (documents, document of each position) -> values


def effects(draw: Callable[..., np.ndarray]) -> Draw:
    """A part that positions of a document share, and one of their own."""
    return lambda documents, owner: draw(size=documents)[owner] + draw(size=len(owner))


def shares(a: float, b: float) -> Draw:
    """Hits whose probability differs between documents."""
    return lambda documents, owner: RNG.binomial(1, RNG.beta(a, b, size=documents)[owner]).astype(float)


KINDS: dict[str, tuple[float, Draw]] = {
    "normal": (0.0, effects(RNG.normal)),
    "heavy-tailed (t, 3 degrees)": (0.0, effects(lambda size: RNG.standard_t(3, size=size))),
    "skewed (exponential)": (2.0, effects(RNG.exponential)),
    "share of 0.3": (0.3, shares(0.6, 1.4)),
    "share of 0.1, in few documents": (0.1, shares(0.2, 1.8)),
}


def main() -> None:
    """Print one line per kind and number of documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=2000)
    parser.add_argument("--documents", type=int, nargs="+", default=[2, 5, 10, 18, 40])
    options = parser.parse_args()
    for kind, (truth, draw) in KINDS.items():
        limits = (0.0, 1.0) if kind.startswith("share") else None
        for documents in options.documents:
            hits, plain, known = 0, 0, 0
            for _ in range(options.worlds):
                owner = np.repeat(RNG.permutation(documents), RNG.integers(1, 6, size=documents))
                values = draw(documents, owner)
                one = estimate([(values, np.ones(len(owner)))], resample(owner.tolist()), limits)
                assert one is not None
                low, high = np.nanquantile(one.draws, [0.025, 0.975])
                plain += low <= truth <= high
                if interval := one.interval():
                    known, hits = known + 1, hits + (interval[0] <= truth <= interval[1])
            covered = f"{hits / known:.3f}" if known else "none"
            print(f"{kind}, {documents} documents: {covered}; percentile {plain / options.worlds:.3f}", flush=True)


if __name__ == "__main__":
    main()
