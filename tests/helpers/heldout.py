"""Held-out text of a tiny model: subjects and records."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from forethought import rollout
from forethought.config import Config, Evaluate, from_dict, merge
from forethought.data.positions import ThoughtFormat, thought_format
from forethought.eval import controls, heldout
from forethought.models.loading import load_model, load_tokenizer
from forethought.rollout.native import NativeEngine
from forethought.run import distributed
from helpers.models import (
    FORM,
    config,
    engine,
    qwen3,
    window,
    word_tokenizer,
)
from helpers.runs import options

EVALUATION = {"path": "world:cups/heldout", "documents": 3, "positions": 2, "thoughts": 2}


def records(
    document: list[int], think: list[float], nothink: list[float], closed: list[float] | None = None
) -> heldout.Records:
    size = len(document)
    return heldout.Records(
        document=document,
        at=list(range(1, size + 1)),
        window=document,
        text=document,
        nothink=nothink,
        nothink_hit=[True] + [False] * (size - 1),
        entropy=[1.0] * size,
        think=think,
        think_hit=[0.5] * size,
        length=[float(i) for i in range(size)],
        closed=closed or [1.0] * size,
        marginal=think,
        leakage=[0.0] * size,
    )


def setup(tmp_path: Path, **changes: Any) -> tuple[Any, NativeEngine, Config]:
    config = from_dict(options(tmp_path, "run", **merge({"evaluate": EVALUATION}, changes)))
    model, form = load_model(config.model, config.seed), thought_format(load_tokenizer(config.model), config.method)
    return model, rollout.engine(model, form, config), config


TEXTS = [window(5, 6, 7, 8, 9, 10), window(9, 8, 5, 7), window(11, 8, 10, 5, 6, 6)]


def subject(model: Any, thoughts: int = 2, form: ThoughtFormat = FORM, **changes: Any) -> heldout.Subject:
    settings = dataclasses.replace(
        config(rows=4, thought_length=4),
        evaluate=Evaluate(path="some.jsonl", positions=2, thoughts=thoughts),
    )
    sampler, tokenizer = engine(model, settings, form), word_tokenizer()
    return heldout.Subject(model=model, engine=sampler, form=form, tokenizer=tokenizer, config=settings, **changes)


def documents() -> list[Any]:
    return [dataclasses.replace(one, document=f"d{i}") for i, one in enumerate(TEXTS)]


def write_controls(environment: dict[str, str], file: Path) -> None:
    """The generic thought and all records of a tiny model, measured as one of several ranks."""
    os.environ.update(environment)
    one = subject(qwen3(), thoughts=2)
    with distributed.process_group(one.config):
        windows = [dataclasses.replace(some, document=f"{i}") for i, some in enumerate(TEXTS * 5)]
        generic = controls.best_thought(one, windows, quiet)
        records = controls.measure(one, windows[:4], quiet, generic)["all"]
    file.write_text(json.dumps([generic, dataclasses.asdict(records)]))


def quiet(*_: Any) -> None:
    return None
