"""The card of an exported model, RUN/policy/README.md: data, budget, gain with intervals, controls, how to make it."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from forethought._version import __version__
from forethought.config import Config, flatten, to_dict
from forethought.tools.report.comparison import COSTS, METRICS
from forethought.tools.report.evaluation import interval
from forethought.tools.report.runs import number
from forethought.tools.report.text import UNBROKEN, duration, figure, visible

_METHODS = {
    "rlp": "RLP, reinforcement learning pretraining ([arXiv:2510.01265](https://arxiv.org/abs/2510.01265))",
    "rpt": "RPT, reinforcement pre-training ([arXiv:2506.08007](https://arxiv.org/abs/2506.08007))",
    "mixed": "mixed supervised training, with and without thoughts of its start that gained",
    "cpt": "continued next-token pretraining, which samples no thoughts",
}
_CONTROLS = ("gain_self", "gain_empty", "gain_random", "gain_shuffled", "kept_shuffled", "drift", "leakage", "truth")
_ID = re.compile(r"[\w.-]+/[\w.-]+")

Figures = Mapping[str, Any]


def text(config: Config, summary: Figures, measured: tuple[str, Figures] | None = None) -> str:
    """The card of the model that a run trained, with the metadata that the Hugging Face hub reads.

    `summary` is the run's summary.json. `measured` is the held-out text of an evaluation and its evaluate.json, which
    brings the controls. No licence is set: those of the base and of the text bind the model, and only its user knows
    them.
    """
    parts = [
        f"---\n{_metadata(config)}\n---",
        f"# {visible(Path(config.run).name) or 'A thinking model'}",
        _opening(config),
        _usage(config),
        "## Data and budget\n\n" + _rows({**_data(config), **_budget(config, summary)}),
        "## Measured\n\n" + _gain(config, summary),
        "## Controls\n\n" + _controls(measured),
        _recipe(config),
        "## Licence\n\nNone is set here. The licences of the base model and of the text bind this model: read them, "
        "then name this model's own as `license:` in the first lines of this file.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(config: Config) -> str:
    thinks = config.method.samples_thoughts
    return ModelCardData(
        base_model=_hub_id(config.model.path),
        datasets=[name] if (name := _hub_id(config.corpus.path.removeprefix("hub:"))) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["forethought", config.method.name, *(["reasoning"] if thinks else [])],
        ignore_metadata_errors=False,
    ).to_yaml()


def _hub_id(name: str) -> str | None:
    """A name as the hub knows it; None for a path on a disk, a GGUF file, or something inside the package."""
    local = name.endswith((".gguf", ".json")) or name.startswith((".", "/", "~")) or Path(name).exists()
    return name if _ID.fullmatch(name) and not local else None


def _opening(config: Config) -> str:
    base = "fresh weights of the architecture of" if config.model.init == "random" else "the base model"
    return (
        f"Trained from {base} {_code(config.model.path)} by {_METHODS[config.method.name]}, with Forethought "
        f"{__version__}."
    )


def _usage(config: Config) -> str:
    method = config.method
    return f"""## Use

```python
from forethought import ThinkingModel

model = ThinkingModel.load("this-folder-or-hub-id")
for place in model.generate("Some text", max_tokens=20, thoughts=4):
    print(place.text, end="")
```

It thinks between {_code(method.open)} and {_code(method.close)}, {method.thought_length} tokens at most, at
temperature {method.temperature:g}, around the text as in {_code(method.prompt)}; `forethought.json` carries this. The
weights are those of an ordinary causal language model: without Forethought it predicts without a thought."""


def _data(config: Config) -> dict[str, str]:
    corpus = config.corpus
    return {
        "base model": _code(config.model.path) + (" (architecture alone)" if config.model.init == "random" else ""),
        "text": f"{_code(corpus.path)}, windows of at most {corpus.window:,} tokens",
        "method": _method(config),
        "seed": str(config.seed),
    }


def _method(config: Config) -> str:
    method = config.method
    if not method.samples_thoughts:
        return f"cpt, {config.train.batch:,} windows a step"
    control = "; rewards drawn at random, a control" if method.reward == "random" else ""
    return (
        f"{method.name}, {config.train.batch:,} positions a step, {method.group} thoughts each, horizon "
        f"{method.horizon}{control}"
    )


def _budget(config: Config, summary: Figures) -> dict[str, str]:
    labels = dict(COSTS) | {"documents": "documents read", "tokens": "tokens of text read"}
    shown = {}
    for name in ("steps", "documents", "tokens", "flops", "flops_rollout", "flops_update", "seconds"):
        value = number(summary.get(name))
        if value is None or (name == "flops_rollout" and not config.method.samples_thoughts):
            continue
        label = "wall time" if name == "seconds" else labels[name]
        exact = f"{value:.3g}" if name.startswith("flops") else f"{value:,.0f}"
        shown[label] = duration(value) if name == "seconds" else exact
    return shown


def _gain(config: Config, summary: Figures) -> str:
    if not config.evaluate.path:
        return "Nothing: the run named no held-out text (`evaluate.path`)."
    table = _table(summary, ("before", "after"), tuple(METRICS))
    return (
        f"On held-out text, {_code(config.evaluate.path)}, at the same positions before and after training; in "
        f"brackets 95{UNBROKEN}% bootstrap intervals over documents.\n\n{table}"
    )


def _controls(measured: tuple[str, Figures] | None) -> str:
    if measured is None:
        return (
            "Not measured yet. `forethought evaluate` on the run folder measures what is left of the gain after an "
            "empty thought, another position's thought and random tokens, and writes it here. A gain that survives "
            "shuffling is not reasoning."
        )
    held_out, figures = measured
    table = _table({f"after/{name}": value for name, value in figures.items()}, ("after",), _CONTROLS)
    return (
        f"On {_code(held_out)}, what is left of the gain over the model itself (nats) when the thought is "
        f"empty, another position's, or random tokens. A gain that survives shuffling is not reasoning.\n\n{table}"
    )


def _table(figures: Figures, phases: tuple[str, ...], metrics: tuple[str, ...]) -> str:
    """A table of each group of positions; metrics that were not measured are left out."""
    groups = sorted(
        {name.split("/")[1] for name in figures if name.count("/") == 2}, key=lambda one: (one != "all", one)
    )
    tables = []
    for group in groups:
        count = number(figures.get(f"{phases[-1]}/{group}/positions"))
        rows = {
            METRICS[metric].label: " | ".join(_cell(figures, f"{phase}/{group}/{metric}", metric) for phase in phases)
            for metric in metrics
            if any(f"{phase}/{group}/{metric}" in figures for phase in phases)
        }
        tables.append(_rows(rows, f"{_cell_text(group)}: {count:,.0f} positions" if count else group, phases))
    return "\n\n".join(tables)


def _cell(figures: Figures, name: str, metric: str) -> str:
    unit = METRICS[metric].unit
    ends = interval([number(figures.get(f"{name}/{end}")) for end in ("low", "high")], unit)
    return figure(figures.get(name), unit) + (f" [{ends}]" if ends else "")


def _rows(rows: Mapping[str, str], head: str = "", columns: tuple[str, ...] = ("",)) -> str:
    lines = [f"| {head} | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {label} | {value} |" for label, value in rows.items())])


def _recipe(config: Config) -> str:
    return (
        "## Made with\n\n    forethought train config.toml\n\nwhere config.toml is\n\n```toml\n"
        f"{toml(config)}```\n\nA claim about the method takes a comparison with plain pretraining and random rewards "
        "on the same text: `forethought compare`."
    )


def toml(config: Config) -> str:
    """A config file: every option that is not at its default, a line each. Read back it is the same config."""
    usual = flatten(to_dict(Config()))
    lines = [
        f"{option} = {_literal(value)}\n"
        for option, value in flatten(to_dict(config)).items()
        if value != usual[option] and option != "overwrite"
    ]
    return "".join(lines)


def _literal(value: Any) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _code(value: str) -> str:
    """Text as code, in one line, that may stand in a table."""
    shown = visible(value).replace("\n", "\\n")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}".replace("|", "\\|")


def _cell_text(value: str) -> str:
    return visible(value).replace("|", "\\|")
