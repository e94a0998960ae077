"""Load a model and its tokenizer: an embedded base, a hub id, a folder, a GGUF file, or fresh weights."""

import contextlib
import functools
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from forethought.config import Config, Model, UserError, to_dict
from forethought.data.positions import ThoughtFormat
from forethought.flops import Shape

_ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = {"embedded": _ASSETS / "base", "embedded:notes": _ASSETS / "notes"}
HUB_PATIENCE_S = 5.0
CARRIED = "forethought.json"
"""The file in which a model that was trained to think carries how: delimiters, template, length and sampling."""
_HABITS = {
    "model": ("prefix",),
    "method": ("open", "close", "prompt", "thought_length", "temperature", "top_p"),
}


def load_tokenizer(options: Model) -> PreTrainedTokenizerBase:
    """The tokenizer that model.tokenizer or model.path names. Raises UserError."""
    source = options.tokenizer or options.path
    with _explained("model.tokenizer" if options.tokenizer else "model.path", source):
        folder, extra = _locate(source)
        if folder.suffix == ".json":
            folder = folder.parent
        return AutoTokenizer.from_pretrained(str(folder) if folder.exists() else source, **extra)


def load_model(options: Model, seed: int) -> Any:
    """A causal LM in fp32 on its device, in evaluation mode (no dropout), ready to be trained. Raises UserError."""
    with _explained("model.path", options.path):
        folder, extra = _locate(options.path)
        source = str(folder) if folder.exists() else options.path
        if options.init == "random":
            model = _fresh(source, extra, seed)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **({} if "gguf_file" in extra else {"use_safetensors": True}),
                **_dequantized(extra),
            )
            model, loading = loaded
            _check_complete(loading)
        _check_usable(model)
    return model.to(device=device(options), dtype=torch.float32).eval()


def load_shape(options: Model) -> Shape:
    """The shape of the network that model.path names, from its config alone. Raises UserError."""
    with _explained("model.path", options.path):
        folder, extra = _locate(options.path)
        source = str(folder) if folder.exists() else options.path
        return Shape.of(AutoConfig.from_pretrained(source, **extra).get_text_config())


def save_thinking_options(folder: Path, config: Config) -> None:
    """Write into an exported model's folder how it was trained to think. Raises OSError."""
    options = to_dict(config)
    habits = {section: {name: options[section][name] for name in names} for section, names in _HABITS.items()}
    (folder / CARRIED).write_text(json.dumps({"version": 1, **habits}, indent=2) + "\n", encoding="utf-8")


def load_thinking_options(source: str) -> dict[str, Any]:
    """Nested options that a model carries (model.path, as load_model takes it); empty where it carries none.

    Raises UserError for a forethought.json that is broken or of a later version.
    """
    with _explained("model.path", source):
        folder, extra = _locate(source)
        file = folder / CARRIED
        if not folder.exists():
            try:
                offline = extra["local_files_only"]
                file = Path(hub.hf_hub_download(source, CARRIED, local_files_only=offline))
            except EntryNotFoundError:
                return {}
        if not file.is_file():
            return {}
        habits = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(habits, dict) or habits.get("version") != 1:
            raise ValueError(f"{CARRIED} must hold version 1; this Forethought knows no other")
        return {
            section: {name: habits[section][name] for name in names if name in habits.get(section, {})}
            for section, names in _HABITS.items()
        }


def device(options: Model) -> torch.device:
    """The device that model.device names."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device = 'cuda': no CUDA device is available here")
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


def check_context_length(config: Config, form: ThoughtFormat) -> None:
    """Refuse rows that the model has no positions for: window, template, delimiters and thought together."""
    with _explained("model.path", config.model.path):
        folder, extra = _locate(config.model.path)
        source = str(folder) if folder.exists() else config.model.path
        limit = getattr(AutoConfig.from_pretrained(source, **extra).get_text_config(), "max_position_embeddings", None)
    method = config.method
    thought = form.overhead + method.thought_length if method.samples_thoughts or config.evaluate.path else 0
    thought += method.prediction_length - 1 if method.name == "rpt" else 0
    need = config.corpus.window + thought
    if limit is not None and need > limit:
        raise UserError(
            f"corpus.window = {config.corpus.window}: with {thought} tokens for a thought that makes {need}, "
            f"and the model has positions for {limit}; shorten corpus.window or method.thought_length"
        )


def _locate(source: str) -> tuple[Path, dict[str, Any]]:
    """Folder (or hub id, as a path that does not exist) and the arguments that loading from there takes.

    Code that comes with a model is never run, and never asked about.
    """
    path, extra = EMBEDDED.get(source, Path(source).expanduser()), {"trust_remote_code": False}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError("no such file")
        return path.parent, {**extra, "gguf_file": path.name}
    if path.exists():
        return path, extra
    if source.startswith("embedded:"):
        raise FileNotFoundError(f"no such base, must be one of {', '.join(EMBEDDED)}")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError("no such folder")
    return path, {**extra, "local_files_only": not _hub_answers(source)}


@functools.cache
def _hub_answers(source: str) -> bool:
    """Whether the hub says anything about an id, asked once: transformers would ask for most of a minute."""
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(source, "config.json"), timeout=HUB_PATIENCE_S)
    except HfHubHTTPError:
        return True
    except Exception:
        return False
    return True


def _check_complete(loading: dict[str, Any]) -> None:
    """Refuse weights that transformers would draw at random because the files lack them or hold another shape."""
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, {missing[0]} among them")
    if odd := sorted(loading["mismatched_keys"]):
        name, found, wanted = odd[0]
        raise ValueError(f"{len(odd)} weights have another shape: {name} is {tuple(found)}, not {tuple(wanted)}")


def _check_usable(model: Any) -> None:
    """Refuse a model that cannot decode with a cache, and mend generation options that could not be saved again."""
    taken = inspect.signature(model.forward).parameters
    if lacking := {"past_key_values", "logits_to_keep"} - set(taken):
        names = " and no ".join(sorted(lacking))
        raise ValueError(f"{type(model).__name__} takes no {names}, so it cannot sample thoughts with a cache")
    if model.generation_config is not None:
        try:
            model.generation_config.validate(strict=True)
        except ValueError:
            model.generation_config.do_sample = True  # it names a temperature or top_p, which only sampling uses


def _dequantized(extra: dict[str, Any]) -> dict[str, Any]:
    """GGUF weights become ordinary fp32 ones; releases before GgufConfig always did that."""
    if "gguf_file" in extra and hasattr(transformers, "GgufConfig"):
        return {**extra, "quantization_config": transformers.GgufConfig(dequantize=True)}
    return extra


def _fresh(source: str, extra: dict[str, Any], seed: int) -> Any:
    architecture = AutoConfig.from_pretrained(source, **extra)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)


@contextlib.contextmanager
def _explained(option: str, value: str) -> Iterator[None]:
    """Turn a loader's complaint about what the user named into one line; loaders raise errors of any type."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{option} = {value!r} cannot be loaded: {text[:300]}") from error
