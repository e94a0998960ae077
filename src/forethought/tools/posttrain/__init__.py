"""Post-training on any start, by TRL's own trainers: supervised, then RL with verifiable rewards, one file a stage.

OUT/config.json     options of the run: its model is the start
OUT/stage.json      the stage, which also tells that the folder is none to resume
OUT/trl.jsonl       what TRL logged, a line a logged step
OUT/policy/         the trained model
OUT/summary.json    written last; the loss on held-out rows before and after, where the stage names some
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from forethought.config import Config, UserError
from forethought.data.positions import ThoughtFormat, thought_format
from forethought.eval import started, trained
from forethought.models.loading import load_model, load_tokenizer
from forethought.models.logprobs import forward, log_probabilities
from forethought.run.checkpoint import tensor_errors
from forethought.run.folder import RunLog, check_free, disk_errors
from forethought.run.trackers import Callbacks
from forethought.tools.posttrain.examples import Example, Verified, examples
from forethought.tools.posttrain.stage import Stage, of, options_of, read


def posttrain(
    path: str | Path, start: str | Path, overrides: dict[str, Any] | None = None, observer: Callbacks | None = None
) -> Path:
    """One stage, from a run's trained model or any other model, into a run folder of its own; returns the folder.

    `path`: a stage's file, or the name of a shipped one. `overrides`: options over it, and `run`, `seed`, `overwrite`
    of the new folder. Its model can be measured as that of any run, and be the start of the next stage.

    Raises:
        UserError: a mistake in the stage, its data or the start.
    """
    overrides = dict(overrides or {})
    own = {name: overrides.pop(name) for name in ("run", "seed", "overwrite") if name in overrides}
    stage = read(path, overrides)
    log, config = started(start, {}, "posttrain")
    config = config if log is None else trained(config, log.path)
    folder = Path(str(own.get("run", f"runs/{Path(start).name}-{Path(path).stem}")))
    if not own.get("overwrite"):
        check_free(folder, overwrite=False)
    run_stage(stage, options_of(stage, config, folder, int(own.get("seed", config.seed))), observer or Callbacks())
    return folder


def chain(stages: Sequence[Stage], start: Config, folder: Path, observer: Callbacks) -> Path:
    """Stages one after the other, FOLDER/1-sft, FOLDER/2-rlvr, ...; what is finished is not done again.

    `start`: options whose model is the start. Returns the last stage's folder. Raises UserError where a folder holds
    another stage.
    """
    last = folder
    for number, stage in enumerate(stages, start=1):
        last = folder / f"{number}-{stage.stage}"
        if (last / "summary.json").is_file():
            if of(RunLog.open(last).read_json("stage.json"), last) != stage:
                raise UserError(f"{last} was made by another {stage.stage} stage; name another run (--run PATH)")
        else:
            run_stage(stage, options_of(stage, start, last, start.seed), observer)
        start = trained(start, last)
    return last


def run_stage(stage: Stage, config: Config, observer: Callbacks) -> None:
    """Load the start that `config` names, train it, leave a finished folder, `config.run`. Raises UserError."""
    from forethought.tools.posttrain import trainers as trl

    began = time.perf_counter()
    tokenizer = load_tokenizer(config.model)
    form = thought_format(tokenizer, config.method)
    rows = examples(stage, config, tokenizer, form)
    end = _end(stage, tokenizer)
    kept = _kept_out(stage, config, tokenizer, form)
    model = load_model(config.model, config.seed)
    _check_room(stage, [*rows, *kept], model)
    figures = {"before/heldout_loss": completion_loss(model, kept)} if kept else {}
    log = RunLog.create(config)

    def seen(done: int, total: int) -> None:
        observer.phase(stage.stage, done, total)

    with log.lock():
        log.write_json("stage.json", _plain(stage))
        if stage.stage == "sft":
            lines = trl.supervise((model, tokenizer), [(one.prompt, one.completion) for one in rows], config, seen)
        else:
            asked = [{"prompt": one.prompt, "answer": one.answer} for one in rows]
            sampling = trl.Sampling(group=stage.group, longest=stage.max_tokens, temperature=stage.temperature, end=end)
            reward = Verified(stage, tokenizer, form)
            lines = trl.reinforce((model, tokenizer), asked, reward, sampling, config, seen)
        log.write_lines("trl.jsonl", lines)
        _export(log.path, model, tokenizer)
        figures |= {"after/heldout_loss": completion_loss(model, kept)} if kept else {}
        seconds = round(time.perf_counter() - began, 2)
        log.write_json("summary.json", {"method": stage.stage, "seed": config.seed, "seconds": seconds, **figures})


@torch.no_grad()
def completion_loss(model: Any, rows: Sequence[Example]) -> float:
    """Mean -log p of the tokens of completions behind their prompts, in nats a token; what `sft` descends."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for one in rows:
        tokens = torch.tensor([one.prompt + one.completion], device=model.device)
        keep = len(one.completion) + 1
        logits = forward(model, tokens, torch.ones_like(tokens, dtype=torch.bool), keep)[:, :-1]
        total -= log_probabilities(logits, tokens[:, 1 - keep :]).sum().item()
        count += keep - 1
    model.train(training)
    return total / count


def _kept_out(stage: Stage, config: Config, tokenizer: Any, form: ThoughtFormat) -> list[Example]:
    """The rows that are measured before and after. Raises UserError."""
    if not stage.heldout:
        return []
    if stage.stage != "sft":
        raise UserError(
            f"heldout = {stage.heldout!r}: only of an sft stage; forethought questions asks after any other"
        )
    asked = dataclasses.replace(stage, data=stage.heldout, train={"steps": 1, "batch": stage.heldout_rows})
    try:
        rows = examples(asked, options_of(asked, config, Path(config.run), 0), tokenizer, form)
    except UserError as error:
        raise UserError(f"heldout: {error}") from None
    return [one for i, one in enumerate(rows) if one not in rows[:i]]  # a short file comes round again


def _check_room(stage: Stage, rows: Sequence[Example], model: Any) -> None:
    """Refuse rows that the model has no positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    further = stage.max_tokens if stage.stage == "rlvr" else 0
    longest = max(len(one.prompt) + (further or len(one.completion)) for one in rows)
    if limit is not None and longest > limit:
        raise UserError(
            f"max_tokens = {stage.max_tokens}: the longest prompt and completion make {longest} tokens, and the model "
            f"has positions for {limit}"
        )


def _export(run: Path, model: Any, tokenizer: Any) -> None:
    """RUN/policy, there whole or not at all. Raises RunError (disk)."""
    partial = run / ".policy-partial"
    with disk_errors(run, partial), tensor_errors(partial):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(run / "policy")


def _end(stage: Stage, tokenizer: Any) -> int | None:
    if not stage.end:
        if tokenizer.eos_token_id is None and stage.stage == "rlvr":
            raise UserError("end = '': this tokenizer has no end of text; name a token that ends a completion")
        return None
    tokens = tokenizer.encode(stage.end, add_special_tokens=False)
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        raise UserError(f"end = {stage.end!r}: must be one token of this tokenizer, is {len(tokens)}")
    return tokens[0]


def _plain(stage: Stage) -> dict[str, Any]:
    return dataclasses.asdict(stage)
