"""Measure a model or a run: on held-out text (`forethought evaluate`)."""

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

from forethought import rollout
from forethought.config import Config, UserError, changes, from_dict, load, merge, to_dict
from forethought.data import corpus
from forethought.data.positions import thought_format
from forethought.eval import controls, heldout, viewer
from forethought.models import lora, sharding
from forethought.models.compute_copy import compute_copy
from forethought.models.loading import check_context_length, load_model, load_thinking_options, load_tokenizer
from forethought.run import checkpoint
from forethought.run.diagnostics import CONTENT_UNUSED, diagnose_evaluation
from forethought.run.folder import RunLog, check_free, read_lines


def evaluate(
    target: str | Path, overrides: dict[str, Any] | None = None, progress: controls.Progress | None = None
) -> tuple[dict[str, Any], Path]:
    """Held-out figures of a run (its trained model, with the run's options) or of a model (with the defaults).

    `overrides` is a nested dict of options. A run's figures go to RUN/evaluate.json, and its base is the model that
    the run began with; a model's go to evaluate.json in a new folder, `run`, and it is its own base. Beside it goes
    documents.json, a few documents thought at every position. `progress` is told the phase, what is done of it and
    how much there is. Returns the figures (flat keys, docs/metrics.md; `options` that differ from the run's, the text
    of the `generic_thought`, and `warnings` of the diagnostics, which also go to warnings.jsonl, where there are any)
    and the file. Raises UserError.
    """
    began, progress = time.perf_counter(), progress or (lambda name, done, total: None)
    log, config = started(target, overrides or {}, "evaluate")
    if not config.evaluate.path:
        unknown = f", and {str(target)!r} is no run that names any" if log is None else ""
        raise UserError(f"evaluate.path = '': name the held-out text to evaluate on{unknown}")
    corpus.check_corpus(dataclasses.replace(config.corpus, path=config.evaluate.path), "evaluate.path")
    if log is None:
        check_free(Path(config.run), config.overwrite)
        subject = start = subject_of(config)
    else:
        subject, start = trained_subject(config, log.path), subject_of(config)
    windows = heldout.held_out(config, subject.tokenizer)
    has_corpus = log is not None or "path" in (overrides or {}).get("corpus", {})  # the default is no model's text
    log = log or RunLog.create(config)
    log.check_writable()
    generic = controls.generic_thought(subject, windows, progress) if has_corpus else None
    records = base = controls.measure(subject, windows, progress, generic)
    if subject is not start:
        base = heldout.measure(start, windows, lambda done, total: progress("evaluating the base", done, total))
    reference = start.model if subject.teacher is None else subject.teacher
    shown = viewer.documents(subject, reference, windows, str(target), progress)
    figures: dict[str, Any] = {"seed": config.seed, **overridden(log, config), **heldout.summarize(records, base)}
    if generic is not None:
        figures["generic_thought"] = subject.tokenizer.decode(generic)
    figures["seconds"] = round(time.perf_counter() - began, 2)
    rows = read_lines(log.path / "metrics.jsonl")
    step = rows[-1].get("step", 0) if rows else 0
    after = {f"after/{name}": value for name, value in figures.items()}
    found = [dataclasses.asdict(one) for one in diagnose_evaluation(after, step)]
    earlier = read_lines(log.path / "warnings.jsonl")
    kept = [row for row in earlier if row.get("name") != CONTENT_UNUSED]  # without those of an earlier evaluation
    if earlier or found:
        log.write_lines("warnings.jsonl", [*kept, *found])
    figures |= {"warnings": found} if found else {}
    log.write_json("documents.json", shown)
    log.write_json("evaluate.json", figures)
    return figures, log.path / "evaluate.json"


def run_at(target: str | Path) -> RunLog | None:
    """The run in a folder; None where the name is that of a model. Raises UserError."""
    is_run = any((Path(target) / name).exists() for name in (".lock", "metrics.jsonl", "checkpoints"))
    return RunLog.open(target) if is_run else None


def started(target: str | Path, overrides: dict[str, Any], command: str) -> tuple[RunLog | None, Config]:
    """What a command is to measure: a run with its own options, or a model (no log yet) with the defaults."""
    log = run_at(target)
    for option in overrides.keys() & {"run", "overwrite"} if log else ():
        raise UserError(f"--{option}: the figures of a run go into its own folder, {target}")
    start = to_dict(log.config()) if log else _model_options(str(target), command)
    return log, from_dict(merge(start, overrides), saved=log is not None)


def overridden(log: RunLog, config: Config) -> dict[str, dict[str, Any]]:
    """The options with which a run is measured, where they are not its own: {"options": {name: value}}, or nothing."""
    found = {option: now for option, (_, now) in changes(log.config(), config).items()}
    return {"options": found} if found else {}


def _model_options(model: str, command: str) -> dict[str, Any]:
    """Options for measuring a model that no run made: the defaults (an embedded base: its quickstart), and its own."""
    start = to_dict(load({"embedded": "quickstart", "embedded:notes": "quickstart-notes"}.get(model)))
    own = merge(load_thinking_options(model), {"run": f"runs/{command}-{Path(model).name}", "model": {"path": model}})
    return merge(start, own)


def trained(config: Config, run: Path) -> Config:
    """The run's config with its trained model in the place of its start."""
    folder = run / "policy"
    if not folder.is_dir():
        known = "its newest checkpoint is kept in checkpoints/" if checkpoint.latest(run) else "it has no checkpoint"
        raise UserError(f"run {str(run)!r} is not finished ({known}); finish it with: forethought train --resume {run}")
    model = dataclasses.replace(config.model, path=str(folder), tokenizer="", init="pretrained")
    return dataclasses.replace(config, model=model)


def trained_subject(config: Config, run: Path) -> heldout.Subject:
    """The run's trained model, with the teacher of its last checkpoint where that is still there.

    Adapters stay beside the weights, as in training: merged into bf16 weights, most of what they add is rounded away.
    """
    last, exported = checkpoint.latest(run), trained(config, run)
    policy = lora.load_exported(config, run / "policy") if config.lora.r else None
    subject = subject_of(exported, policy and policy.model)
    saved = checkpoint.Saved(last, only="teacher") if last else None
    if saved is None or not saved.names:
        return subject
    if policy is not None:
        factors = copy.deepcopy(policy.weights)
        sharding.load_weights(saved, {"teacher": factors})
        return dataclasses.replace(subject, teacher=factors, as_model=policy.swapped_weights)
    teacher = load_model(exported.model, config.seed)
    sharding.load_weights(saved, {"teacher": teacher})
    return dataclasses.replace(subject, teacher=compute_copy(teacher, config.model.precision))


def subject_of(config: Config, model: Any = None) -> heldout.Subject:
    """Load all that a measurement takes, so that what is wrong with it is known before a folder is made.

    `model` takes the place of the config's, which has its tokenizer and its context window.
    """
    tokenizer = load_tokenizer(config.model)
    form = thought_format(tokenizer, config.method)
    check_context_length(config, form)
    model = model or compute_copy(load_model(config.model, config.seed), config.model.precision)
    engine = rollout.engine(model, form, config)
    return heldout.Subject(model=model, engine=engine, form=form, tokenizer=tokenizer, config=config)
