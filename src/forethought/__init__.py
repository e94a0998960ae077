"""Forethought: RLP, reinforcement learning pretraining (arXiv:2510.01265), as a library and a command line.

`from forethought import ...` offers what `__all__` lists; torch is imported only with the first name that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from forethought.run import __version__ as __version__

if TYPE_CHECKING:
    from forethought.algo.objective import clipped_surrogate, group_advantages, kl_to_reference, next_token_loss
    from forethought.algo.rewards import information_gain
    from forethought.config import Config, RunError, UserError, load
    from forethought.inference import ThinkingModel
    from forethought.models.compute_copy import Teacher
    from forethought.models.loading import load_model, load_tokenizer
    from forethought.rollout import Thoughts
    from forethought.rollout.native import NativeEngine
    from forethought.run.signals import Stopped
    from forethought.run.trackers import Callbacks
    from forethought.tools import evaluate, resume, train
    from forethought.tools.benchmarks import run_benchmarks
    from forethought.tools.experiment import compare
    from forethought.tools.posttrain import posttrain
    from forethought.tools.report import read_runs
    from forethought.tools.report import write as write_report
    from forethought.tools.report.comparison import load as read_comparison

_HOMES = {
    name: home
    for home, names in {
        "config": ("Config", "RunError", "UserError", "load"),
        "run.signals": ("Stopped",),
        "run.trackers": ("Callbacks",),
        "tools": ("evaluate", "resume", "train"),
        "tools.benchmarks": ("run_benchmarks",),
        "tools.experiment": ("compare",),
        "tools.posttrain": ("posttrain",),
        "tools.report": ("read_runs",),
        "tools.report:write": ("write_report",),
        "tools.report.comparison:load": ("read_comparison",),
        "models.loading": ("load_model", "load_tokenizer"),
        "models.compute_copy": ("Teacher",),
        "rollout": ("Thoughts",),
        "rollout.native": ("NativeEngine",),
        "algo.rewards": ("information_gain",),
        "algo.objective": ("clipped_surrogate", "group_advantages", "kl_to_reference", "next_token_loss"),
        "inference": ("ThinkingModel",),
    }.items()
    for name in names
}

__all__ = [
    "Callbacks", "Config", "NativeEngine", "RunError", "Stopped", "Teacher", "ThinkingModel", "Thoughts", "UserError",
    "clipped_surrogate", "compare", "evaluate", "group_advantages", "information_gain", "kl_to_reference", "load",
    "load_model", "load_tokenizer", "next_token_loss", "posttrain", "read_comparison", "read_runs", "resume",
    "run_benchmarks", "train", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'forethought' has no attribute {name!r}")
    home, _, own = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(f"forethought.{home}"), own or name)
    globals()[name] = value
    return value
