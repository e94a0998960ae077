"""Forethought: RLP, reinforcement learning pretraining (arXiv:2510.01265), as a library and a command line.

`from forethought import ...` offers what `__all__` lists; torch is imported only with the first name that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from forethought._version import __version__ as __version__

if TYPE_CHECKING:
    from forethought.config import Config, RunError, UserError
    from forethought.evaluation import evaluate
    from forethought.evaluation.ask import ask
    from forethought.experiment import compare
    from forethought.interrupts import Stopped
    from forethought.loop import resume, train
    from forethought.model import load_model, load_tokenizer
    from forethought.objective import clipped_surrogate, group_advantages, kl_to_reference, next_token_loss
    from forethought.report import write as write_report
    from forethought.rewards import information_gain
    from forethought.rollout import Thoughts
    from forethought.rollout.native import NativeEngine
    from forethought.settings import load
    from forethought.stages import posttrain
    from forethought.teacher import Teacher
    from forethought.thinking import ThinkingModel

_HOMES = {
    "Config": "config",
    "UserError": "config",
    "RunError": "config",
    "Stopped": "interrupts",
    "load": "settings",
    "train": "loop",
    "resume": "loop",
    "evaluate": "evaluation",
    "ask": "evaluation.ask",
    "compare": "experiment",
    "posttrain": "stages",
    "write_report": "report",
    "load_model": "model",
    "load_tokenizer": "model",
    "NativeEngine": "rollout.native",
    "Thoughts": "rollout",
    "information_gain": "rewards",
    "group_advantages": "objective",
    "clipped_surrogate": "objective",
    "kl_to_reference": "objective",
    "next_token_loss": "objective",
    "Teacher": "teacher",
    "ThinkingModel": "thinking",
}

__all__ = [
    "Config",
    "NativeEngine",
    "RunError",
    "Stopped",
    "Teacher",
    "ThinkingModel",
    "Thoughts",
    "UserError",
    "ask",
    "clipped_surrogate",
    "compare",
    "evaluate",
    "group_advantages",
    "information_gain",
    "kl_to_reference",
    "load",
    "load_model",
    "load_tokenizer",
    "next_token_loss",
    "posttrain",
    "resume",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'forethought' has no attribute {name!r}")
    home = importlib.import_module(f"forethought.{_HOMES[name]}")
    value = home.write if name == "write_report" else getattr(home, name)
    globals()[name] = value
    return value
