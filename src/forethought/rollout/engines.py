"""The engine that a config asks for."""

from typing import Any

from forethought.config import Config
from forethought.data.positions import ThoughtFormat
from forethought.rollout.native import native_engine


def engine(model: Any, form: ThoughtFormat, config: Config) -> Any:
    """An `Engine`, for RPT a `Writer`; the model is made ready to share prefixes. Raises UserError where it cannot."""
    native = native_engine(model, form, config)
    if config.rollout.engine == "native":
        return native
    from forethought.rollout.vllm import start

    return start(model, form, config)
