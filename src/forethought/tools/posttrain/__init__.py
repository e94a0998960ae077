"""Post-training with TRL's trainers: SFT, then RL with verifiable rewards (docs/post-training.md).

Each stage has a run folder of its own, which `evaluate`, `report` and the next stage open like any other:

    OUT/config.json     options of the run; its model is the start
    OUT/stage.json      options of the stage; a folder with this file cannot be resumed
    OUT/trl.jsonl       one line per logged step, as TRL logged it
    OUT/policy/         the trained model
    OUT/summary.json    written last; with held-out data, their loss before and after
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forethought.config import Config, UserError, from_dict
from forethought.data.positions import ThoughtFormat, thought_format
from forethought.eval import started, trained
from forethought.models.loading import load_model, load_tokenizer, require_context, save_thinking_options
from forethought.run.checkpoint import exported
from forethought.run.folder import RunLog, check_free
from forethought.run.trackers import Callbacks
from forethought.tools.posttrain.stage import (
    Example,
    Stage,
    Verified,
    end_token,
    examples,
    read,
    stage_config,
    stage_from_dict,
)


def posttrain(
    path: str | Path, start: str | Path, overrides: dict[str, Any] | None = None, callbacks: Callbacks | None = None
) -> Path:
    """Run one stage from the trained model of a run, or from any other model, and return its run folder.

    `path` is a stage's file, or the name of a shipped one. `overrides` are options of the stage, and `run`, `seed` and
    `overwrite` of the new run folder.

    Raises:
        UserError: the stage, its data or the start is invalid.
    """
    overrides = dict(overrides or {})
    folder_options = {name: overrides.pop(name) for name in ("run", "seed", "overwrite") if name in overrides}
    stage = read(path, overrides)
    log, config = started(start, {}, "posttrain")
    config = config if log is None else trained(config, log.path)
    named = {"run": f"runs/{Path(start).name}-{Path(path).stem}", "seed": config.seed}
    chosen = from_dict(named | folder_options)
    check_free(Path(chosen.run), chosen.overwrite)
    run_stage(stage, stage_config(stage, config, Path(chosen.run), chosen.seed), callbacks or Callbacks())
    return Path(chosen.run)


def chain(stages: Sequence[Stage], start: Config, folder: Path, callbacks: Callbacks) -> Path:
    """Run stages one after the other in FOLDER/1-sft, FOLDER/2-rlvr, ...; finished stages are not repeated.

    `start`: a config whose model is the start. Returns the folder of the last stage. Raises UserError if a folder
    contains a different stage.
    """
    last = last_stage(stages, folder)
    for stage, run in zip(stages, _folders(stages, folder), strict=True):
        if not (run / "summary.json").is_file():
            run_stage(stage, stage_config(stage, start, run, start.seed), callbacks)
        start = trained(start, run)
    return last


def last_stage(stages: Sequence[Stage], folder: Path) -> Path:
    """The folder of the last stage of a chain, finished or not. Raises UserError if one finished a different stage."""
    runs = _folders(stages, folder)
    for stage, run in zip(stages, runs, strict=True):
        done = (run / "summary.json").is_file()
        if done and stage_from_dict(RunLog(run).read_json("stage.json"), run) != stage:
            raise UserError(f"{run} contains a different {stage.stage} stage; name another run (--run PATH)")
    return runs[-1]


def _folders(stages: Sequence[Stage], folder: Path) -> list[Path]:
    return [folder / f"{number}-{stage.stage}" for number, stage in enumerate(stages, start=1)]


def run_stage(stage: Stage, config: Config, callbacks: Callbacks) -> None:
    """Train the model of `config` and write the run folder `config.run`. Raises UserError."""
    from forethought.tools import trl

    began = time.perf_counter()
    tokenizer = load_tokenizer(config.model)
    form = thought_format(tokenizer, config.method)
    rows = examples(stage, config, tokenizer, form)
    end_token(stage, tokenizer)
    heldout = _heldout_examples(stage, config, tokenizer, form)
    model = load_model(config.model, config.seed)
    _check_length(stage, [*rows, *heldout], model)
    summary = {"before/heldout_loss": trl.completion_loss(model, heldout)} if heldout else {}
    log = RunLog.create(config)

    def progress(done: int, total: int) -> None:
        callbacks.phase(stage.stage, done, total)

    with log.lock():
        log.write_json("stage.json", dataclasses.asdict(stage))
        if stage.stage == "sft":
            lines = trl.sft((model, tokenizer), rows, config, progress)
        else:
            reward = Verified(stage, tokenizer, form)
            lines = trl.grpo((model, tokenizer), rows, reward, stage, config, progress)
        log.write_lines("trl.jsonl", lines)
        with exported(log.path) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            save_thinking_options(folder, config)
        summary |= {"after/heldout_loss": trl.completion_loss(model, heldout)} if heldout else {}
        seconds = round(time.perf_counter() - began, 2)
        done = {"method": stage.stage, "seed": config.seed, "steps": config.train.steps, "seconds": seconds}
        log.write_json("summary.json", {**done, **summary})


def _heldout_examples(stage: Stage, config: Config, tokenizer: Any, form: ThoughtFormat) -> list[Example]:
    """The examples whose loss is measured before and after training. Raises UserError."""
    if not stage.heldout:
        return []
    if stage.stage != "sft":
        raise UserError(
            f"heldout = {stage.heldout!r}: only for sft stages; measure other stages with forethought questions"
        )
    heldout = dataclasses.replace(stage, data=stage.heldout, train={"steps": 1, "batch": stage.heldout_rows})
    try:
        rows = examples(heldout, stage_config(heldout, config, Path(config.run), 0), tokenizer, form)
    except UserError as error:
        raise UserError(f"heldout: {error}") from None
    return [one for i, one in enumerate(rows) if one not in rows[:i]]  # short files repeat


def _check_length(stage: Stage, rows: Sequence[Example], model: Any) -> None:
    """Raise UserError for examples that exceed the model's context window."""
    further = stage.max_tokens if stage.stage == "rlvr" else 0
    longest = max(len(one.prompt) + (further or len(one.completion)) for one in rows)
    what = f"max_tokens = {stage.max_tokens}: the longest prompt with its completion"
    require_context(model.config, longest, what, "lower max_tokens or leave out long examples")
