"""What a person does with the core. `train`, `resume` and `evaluate` are the core's, followed by the model card.

Importing it imports no torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from forethought.config import Config
from forethought.run.distributed import launcher_rank_and_size

if TYPE_CHECKING:
    from forethought.eval.controls import Progress
    from forethought.run.trackers import Callbacks


def train(config: Config, callbacks: "Callbacks | None" = None) -> dict[str, Any]:
    """Train a config from its start, see `forethought.trainer.train`, and write the model card, RUN/policy/README.md.

    Returns what summary.json holds. Raises UserError, RunError, Stopped.
    """
    from forethought import trainer

    return _with_card(config.run, trainer.train(config, callbacks))


def resume(run: str | Path, callbacks: "Callbacks | None" = None, config: Config | None = None) -> dict[str, Any]:
    """Continue a run from its last checkpoint, see `forethought.trainer.resume`, and write the model card."""
    from forethought import trainer

    return _with_card(run, trainer.resume(run, callbacks, config))


def _with_card(run: str | Path, summary: dict[str, Any]) -> dict[str, Any]:
    from forethought.tools.report import card

    if launcher_rank_and_size()[0] == 0:
        card.write(Path(run))
    return summary


def evaluate(
    target: str | Path, overrides: dict[str, Any] | None = None, progress: "Progress | None" = None
) -> tuple[dict[str, Any], Path]:
    """Evaluate a run or a model on held-out text, see `forethought.eval.evaluate`; a run's model card is rewritten."""
    from forethought import eval as held_out
    from forethought.tools.report import card

    figures, file = held_out.evaluate(target, overrides, progress)
    card.write(file.parent)
    return figures, file
