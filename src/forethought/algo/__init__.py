"""The methods: RLP, the baselines RPT, CPT and Mixed, and what the trainer needs of a method.

A new method is one class with the members of `Method` and one entry in `forethought.config.registry`, or
`--method.name my_file:MyMethod` for code outside the package.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from forethought.algo.metrics import Sums
from forethought.config import Config
from forethought.data.corpus import Window
from forethought.data.positions import ThoughtFormat
from forethought.flops import Work


@runtime_checkable
class Record(Protocol):
    """What one step collected on this rank, as the trainer logs it."""

    def metrics(self) -> Sums:
        """Metrics as (sum, count), added up over ranks."""
        ...

    def text(self, tokenizer: Any, form: ThoughtFormat, positions: int) -> tuple[Sums, list[dict[str, Any]]]:
        """On logged steps: metrics that need decoded text, and rows of thoughts.jsonl, each with a "number"."""
        ...

    def work(self, form: ThoughtFormat, config: Config) -> Work | tuple[int, ...]:
        """The tokens that were and will be processed, for FLOP counts: of thoughts, or of rows of plain text."""
        ...


@runtime_checkable
class Method(Protocol):
    """What the trainer needs of a method, built as Method(network, engine, form, tokenizer, config)."""

    def collect(self, windows: list[Window], step: int) -> Any:
        """A `Record` of everything that one step is trained on, without gradients."""
        ...

    def microbatches(self, record: Any) -> Sequence[Any]:
        """The record in pieces that fit into memory."""
        ...

    def forward_backward(self, microbatch: Any) -> tuple[float, Sums]:
        """Add the gradients of a microbatch's part of the step's loss; the parts add up to the mean over the step."""
        ...

    def after_step(self) -> None:
        """Called after every optimizer step."""
        ...

    def state(self) -> dict[str, torch.nn.Module]:
        """Further networks that a checkpoint must hold, by name. With update.offload none may be used for sampling."""
        ...
