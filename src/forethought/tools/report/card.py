"""The model card of an exported model, RUN/policy/README.md: data, compute, gain with intervals, controls, recipe."""

import contextlib
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id

from forethought.config import Config, Method, UserError, flatten, to_dict
from forethought.config.registry import CONTROL_GAINS, REWARDS, Metric, label
from forethought.html import visible
from forethought.run import __version__
from forethought.run.folder import RunLog
from forethought.tools.report.runs import STEP_OF_STAGE, number
from forethought.tools.report.tables import (
    capitalized,
    duration,
    figure,
    measured,
    metric,
    render,
    windows_note,
    with_interval,
)

_CONTROLS = (*CONTROL_GAINS, "drift", "leakage", "truth")
_STAGES = {"sft": "supervised fine-tuning", "rlvr": "reinforcement learning with verifiable rewards"}
_ID = re.compile(r"[\w.-]+/[\w.-]+")

Figures = Mapping[str, Any]


def write(run: Path) -> None:
    """(Re)write RUN/policy/README.md from the run folder, with the controls of evaluate.json if there is one.

    A run without summary.json has not finished and gets no card. Raises UserError (broken files), RunError (disk).
    """
    if not (run / "summary.json").is_file():
        return
    log = RunLog.open(run)
    config = log.config()
    measured, stage = (log.read_json(f"{name}.json", {}) for name in ("evaluate", "stage"))
    log.write_text("policy/README.md", text(config, log.read_json("summary.json"), measured, stage))


def to_push(run: Path, name: str) -> dict[str, int]:
    """The files of RUN/policy that `push` uploads, with their bytes. A card that is there is kept, with its edits.

    Raises UserError for an unfinished run, a name that is not user/name, and a card that the hub cannot read.
    """
    log, policy = RunLog.open(run), run / "policy"
    if not (policy / "config.json").is_file() or not (run / "summary.json").is_file():
        raise UserError(f"run {str(run)!r} is not finished; finish it with: forethought train --resume {run}")
    if not (policy / "README.md").is_file():
        write(log.path)
    with _one_line(f"push to {name!r}"):
        validate_repo_id(name)
        if "/" not in name:
            raise ValueError("the name of a model on the hub is user/name")
    with _one_line(str(policy / "README.md")):
        ModelCard((policy / "README.md").read_text(encoding="utf-8"))
    files = sorted(path for path in policy.rglob("*") if path.is_file())
    kept = filter_repo_objects(files, ignore_patterns=DEFAULT_IGNORE_PATTERNS, key=lambda one: _inside(one, policy))
    return {_inside(path, policy): path.stat().st_size for path in kept}


def push(run: Path, name: str, private: bool) -> str:
    """Upload the files of `to_push` to the Hugging Face Hub and return the address. Raises UserError."""
    with _one_line(f"push to {name!r}"):
        if get_token() is None:
            raise ValueError("not logged in to the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")
        api = HfApi()
        url = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise ValueError("it exists and is public; make it private on the hub first, or leave out --private")
        message = f"Upload a model trained with Forethought {__version__}"
        api.upload_folder(repo_id=name, folder_path=run / "policy", commit_message=message)
        return str(url)


def _inside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn the errors of the hub's client, which may be of any type, into one line (UserError)."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: {reason[:300]}") from error


def text(config: Config, summary: Figures, measured: Figures | None = None, stage: Figures | None = None) -> str:
    """The card of the model that a run trained, with the metadata of the Hugging Face Hub.

    `summary` is the run's summary.json; `measured` is the evaluate.json of an evaluation, which has the controls;
    `stage` is the stage.json of post-training. The card sets no license: those of the base model and of the text apply,
    and only the user knows them.
    """
    measured = measured or {}
    options = {"evaluate.path": config.evaluate.path, **measured.get("options", {})}
    where = options.pop("evaluate.path") or "held-out text"
    content = {
        "config": config,
        "method": config.method,
        "entry": config.method.entry,
        "stage": stage,
        "title": Path(config.run).name,
        "version": __version__,
        "metadata": _metadata(config, stage),
        "batch": f"{config.train.batch:,}",
        "usual_reward": Method(name=config.method.name).reward_name,
        "budget": _budget(config, summary),
        "losses": [figure(number(summary.get(f"{when}/heldout_loss"))) for when in ("before", "after")],
        "results": _table(summary, ("before", "after")),
        "measured": bool(measured),
        "generic": str(measured.get("generic_thought", "")),
        "where": where,
        "others": [f"{option} = {_literal(value)}" for option, value in options.items()],
        "controls": _table({f"after/{name}": value for name, value in measured.items()}, ("after",), _CONTROLS),
        "start": shlex.quote(config.model.path),
        "recipe": _options(flatten(dict(stage))) if stage else toml(config),
        "label": label,
        "rewards": REWARDS,
        "stages": _STAGES,
        "step_of_stage": STEP_OF_STAGE,
    }
    return render("card.md.j2", content, escape=False, code=_code, cell_text=_cell_text, visible=visible) + "\n"


def _metadata(config: Config, stage: Figures | None) -> str:
    path, method = config.corpus.path, stage["stage"] if stage else config.method.name
    return ModelCardData(
        base_model=_hub_id(config.model.path),
        datasets=[path.removeprefix("hub:")] if path.startswith("hub:") and not stage else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["forethought", method, *(["reasoning"] if config.method.samples_thoughts else [])],
        ignore_metadata_errors=False,
    ).to_yaml()


def _hub_id(name: str) -> str | None:
    """The name if it is a Hub id; None for a local path, a GGUF file, or a model inside the package."""
    local = name.endswith((".gguf", ".json")) or name.startswith((".", "/", "~")) or Path(name).exists()
    return name if _ID.fullmatch(name) and not local else None


def _budget(config: Config, summary: Figures) -> dict[str, str]:
    shown = {}
    for name in ("steps", "documents", "tokens", "flops", "flops_rollout", "flops_update", "seconds"):
        value = number(summary.get(name))
        if value is None or (name == "flops_rollout" and not config.method.samples_thoughts):
            continue
        exact = f"{value:.3g}" if name.startswith("flops") else f"{value:,.0f}"
        shown[metric(name).label] = duration(value) if name == "seconds" else exact
    return shown


def _table(figures: Figures, phases: tuple[str, ...], metrics: tuple[str, ...] = ()) -> str:
    """A table for each group of positions: these metrics, or all of them, as far as they were measured."""
    tables = []
    for group, known in measured(figures, phases):
        count = number(figures.get(f"{phases[-1]}/{group}/positions"))
        shown = [one for one in map(metric, metrics) if one in known] if metrics else known
        rows = {
            capitalized(one.label): " | ".join(_cell(figures, f"{phase}/{group}", one) for phase in phases)
            for one in shown
        }
        note = windows_note([figures.get(f"{phases[-1]}/{group}/windows")])
        title = _cell_text(group) + (f": {count:,.0f} positions" if count else "") + (f"; {note}" if note else "")
        head = [f"| {title} | {' | '.join(phases)} |", f"| --- |{' --- |' * len(phases)}"]
        tables.append("\n".join([*head, *(f"| {label} | {value} |" for label, value in rows.items())]))
    return "\n\n".join(tables)


def _cell(figures: Figures, group: str, one: Metric) -> str:
    value, ends = with_interval(figures, group, one)
    return f"{value} [{ends}]" if ends else value


def toml(config: Config) -> str:
    """The options that are not at their defaults as a config file, which `load` reads back as the same config."""
    flat, usual = (flatten(to_dict(one)) for one in (config, Config()))
    changed = [option for option in flat if flat[option] != usual[option] and option != "overwrite"]
    return _options({option: flat[option] for option in changed})


def _options(flat: dict[str, Any]) -> str:
    return "".join(f"{option} = {_literal(value)}\n" for option, value in flat.items())


def _literal(value: Any) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _code(value: str) -> str:
    """Text as inline code, safe inside a table."""
    shown = visible(value).replace("\n", "\\n")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}".replace("|", "\\|")


def _cell_text(value: str) -> str:
    return visible(value).replace("|", "\\|")
