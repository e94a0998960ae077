"""Does every token need a thought? Held-out text of a run, with thoughts only where plain prediction is uncertain.

    python benchmarks/where_to_think.py RUN [--documents 40] [--seed 0]

A row per rule: the share of tokens before which the model thinks, sampled tokens per token of text, and cross-entropy
in nats. `where it helps` thinks only where the thought made the true token likelier, which is known only afterwards.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from forethought.config import from_dict, merge, to_dict
from forethought.eval.heldout import held_out
from forethought.inference import ScoredToken, ThinkingModel
from forethought.run.folder import RunLog

RULES: dict[str, Callable[[ScoredToken], bool]] = {
    "never": lambda token: False,
    "everywhere": lambda token: True,
    **{f"entropy > {bound}": lambda token, bound=bound: token.entropy > bound for bound in (0.5, 1.0, 1.5)},
    "where it helps": lambda token: token.gain > 0,
}


def main() -> None:
    """Print one line per rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = ThinkingModel.load(str(options.run / "policy"))
    config = to_dict(RunLog.open(options.run).config())
    windows = held_out(from_dict(merge(config, {"evaluate": {"documents": options.documents}})), model.tokenizer)
    tokens = [one for window in windows for one in model.gains(window.tokens, seed=options.seed)]
    print(f"{len(windows)} documents, {len(tokens)} tokens")
    print("| think | tokens | sampled per token | cross-entropy |\n| --- | --- | --- | --- |")
    for name, thinks in RULES.items():
        chosen = [thinks(one) for one in tokens]
        sampled = sum(len(t.tokens) for one, on in zip(tokens, chosen, strict=True) if on for t in one.thoughts)
        nats = -sum(one.logp if on else one.nothink for one, on in zip(tokens, chosen, strict=True))
        cells = (name, f"{sum(chosen) / len(tokens):.0%}", f"{sampled / len(tokens):.2f}", f"{nats / len(tokens):.3f}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
