"""Load a model and its tokenizer: an embedded base, a hub id, a folder, a GGUF file, or random weights."""

import contextlib
import functools
import inspect
import json
import sys
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
HUB_TIMEOUT_S = 5.0
THINKING_FILE = "forethought.json"
"""How a trained model thinks, saved with it: delimiters, template, length and sampling."""
THINKING = {
    "model": ("prefix",),
    "method": (
        "open", "close", "prompt", "thought_length", "min_thought_length", "allow_empty", "temperature", "top_p",
        "repeat_context",
    ),
}  # fmt: skip
"""The options that are saved there, by section."""


def load_tokenizer(options: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of model.tokenizer or model.path. Raises UserError."""
    source = options.tokenizer or options.path
    with _loading_errors("model.tokenizer" if options.tokenizer else "model.path", source):
        folder, extra = _locate(source)
        if folder.suffix == ".json":
            folder = folder.parent
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else source, **extra)
    try:
        embeddings = getattr(load_architecture(options).get_text_config(), "vocab_size", None)
    except UserError:  # reported when the model is loaded, if it is
        embeddings = None
    if embeddings is not None:
        _check_vocabulary(tokenizer, embeddings, options)
    return tokenizer


def load_model(options: Model, seed: int) -> Any:
    """A causal LM in fp32 on its device, in evaluation mode (no dropout). Raises UserError."""
    if (default := torch.get_default_dtype()) != torch.float32:
        raise UserError(f"torch's default dtype is {default}: set it back with torch.set_default_dtype(torch.float32)")
    with _loading_errors("model.path", options.path):
        if options.init == "random":
            model = _random(load_architecture(options), seed)
        else:
            folder, extra = _locate(options.path)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder) if folder.exists() else options.path,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **({} if "gguf_file" in extra else {"use_safetensors": True}),
                **_dequantized(extra),
            )
            model, loading = loaded
            _check_complete(loading)
            _check_finite(model)
        _check_usable(model)
    return model.to(device=device(options), dtype=torch.float32).eval()


def load_shape(options: Model) -> Shape:
    """The shape of the model of model.path, from its config alone. Raises UserError."""
    with _loading_errors("model.path", options.path):
        return Shape.of(load_architecture(options).get_text_config())


def load_architecture(options: Model) -> Any:
    """The transformers config of model.path. Raises UserError."""
    with _loading_errors("model.path", options.path):
        folder, extra = _locate(options.path)
        return AutoConfig.from_pretrained(str(folder) if folder.exists() else options.path, **extra)


def save_thinking_options(folder: Path, config: Config) -> None:
    """Save with an exported model how it was trained to think. Raises OSError."""
    options = to_dict(config)
    values = {section: {name: options[section][name] for name in names} for section, names in THINKING.items()}
    (folder / THINKING_FILE).write_text(json.dumps({"version": 1, **values}, indent=2) + "\n", encoding="utf-8")


def load_thinking_options(source: str) -> dict[str, Any]:
    """Nested options saved with a model (model.path, as load_model takes it); empty if there are none.

    Raises UserError for a forethought.json that is malformed or of a later version.
    """
    with _loading_errors("model.path", source):
        folder, _ = _locate(source)
        file = folder / THINKING_FILE
        if not folder.exists():
            try:
                file = Path(hub.hf_hub_download(source, THINKING_FILE))
            except EntryNotFoundError:
                return {}
        if not file.is_file():
            return {}
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("version") != 1:
            raise ValueError(f"{THINKING_FILE} must have version 1, the only one that this Forethought reads")
        return {
            section: {name: values[section][name] for name in names if name in values.get(section, {})}
            for section, names in THINKING.items()
        }


def device(options: Model) -> torch.device:
    """The device of model.device. Raises UserError if it is not available."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device = 'cuda': no CUDA device is available here")
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


def check_context_length(config: Config, form: ThoughtFormat) -> None:
    """Raise UserError if window, template, delimiters and thought do not fit into the model's context window."""
    method = config.method
    thought = form.overhead + method.thought_length if method.samples_thoughts or config.evaluate.path else 0
    thought += method.prediction_length - 1 if method.entry.writes else 0
    window = config.corpus.window
    what = f"corpus.window = {window}" + (f" with {thought} tokens for a thought" if thought else "")
    advice = "shorten corpus.window or method.thought_length"
    require_context(load_architecture(config.model), window + thought, what, advice)


def require_context(architecture: Any, tokens: int, what: str, advice: str) -> None:
    """Raise UserError if `what` takes more tokens than the context window of a transformers config."""
    limit = context_window(architecture)
    if tokens > limit:
        whole = getattr(architecture.get_text_config(), "max_position_embeddings", None) or limit
        why = f" of its {whole}, since LongRoPE's frequencies change there" if whole > limit else ""
        raise UserError(f"{what} takes {tokens} tokens, but the model's context window has {limit}{why}; {advice}")


def context_window(architecture: Any) -> int:
    """The number of tokens that a model (of this transformers config) can read; sys.maxsize if it has no limit.

    With LongRoPE those before its frequencies change: beyond, the longest row of a batch sets them for all of its rows.
    """
    options = architecture.get_text_config()
    rope = getattr(options, "rope_parameters", None) or {}
    parts = [one for one in (rope, *rope.values()) if isinstance(one, dict) and one.get("rope_type") == "longrope"]
    limit = getattr(options, "max_position_embeddings", None)
    return min([limit or sys.maxsize, *(one["original_max_position_embeddings"] for one in parts)])


def _locate(source: str) -> tuple[Path, dict[str, Any]]:
    """Folder (or hub id, as a path that does not exist) and the arguments for loading from there.

    Without the hub, a hub id is the folder of its files in the cache: loaders given the id try the hub for minutes.
    Code that comes with a model is never run.
    """
    path, extra = EMBEDDED.get(source, Path(source).expanduser()), {"trust_remote_code": False}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError("no such file")
        return path.parent, {**extra, "gguf_file": path.name}
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError("it holds an adapter alone; give the model with the adapter merged into it (RUN/policy)")
    if path.exists():
        return path, extra
    if source.startswith("embedded:"):
        raise FileNotFoundError(f"no such base, must be one of {', '.join(EMBEDDED)}")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError("no such folder")
    if _hub_is_reachable(source):
        return path, extra
    if not isinstance(cached := hub.try_to_load_from_cache(source, "config.json"), str):
        raise FileNotFoundError("no such run or folder, and the hub, which could have such a model, cannot be reached")
    return Path(cached).parent, extra


@functools.cache
def _hub_is_reachable(source: str) -> bool:
    """Whether the hub answers, checked once with a short timeout: transformers would retry for most of a minute."""
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(source, "config.json"), timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError:
        return True
    except Exception:
        return False
    return True


def _check_vocabulary(tokenizer: Any, embeddings: int, options: Model) -> None:
    """Refuse tokens without an embedding. A pad token without one is replaced, since no model reads it."""
    outside = {token: name for name, token in tokenizer.get_vocab().items() if token >= embeddings}
    read = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    if tokenizer.pad_token_id not in read and outside.pop(tokenizer.pad_token_id, None) is not None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if outside:
        number, name = min(outside.items())
        option, source = ("tokenizer", options.tokenizer) if options.tokenizer else ("path", options.path)
        raise UserError(
            f"model.{option} = {source!r}: its tokenizer has {max(outside) + 1} tokens, but the model has "
            f"{embeddings} embeddings, none for {name!r} ({number}); use its own tokenizer, or resize the embeddings"
        )


def _check_complete(loading: dict[str, Any]) -> None:
    """Refuse weights that transformers would initialize at random: missing ones, or those of another shape."""
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, {missing[0]} among them")
    if mismatched := sorted(loading["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise ValueError(f"{len(mismatched)} weights have another shape: {name} is {tuple(found)}, not {tuple(wanted)}")


def _check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.sum())) and not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"the weights are not finite: {name} holds NaN or infinity")


def _check_usable(model: Any) -> None:
    """Refuse a model that cannot decode with a cache, and fix generation options that could not be saved again."""
    parameters = inspect.signature(model.forward).parameters
    if missing := {"past_key_values", "logits_to_keep"} - set(parameters):
        names = " and no ".join(sorted(missing))
        raise ValueError(f"{type(model).__name__} takes no {names}, so it cannot sample thoughts with a cache")
    if model.generation_config is not None:
        try:
            model.generation_config.validate(strict=True)
        except ValueError:
            model.generation_config.do_sample = True  # it sets a temperature or top_p, which only sampling uses


def _dequantized(extra: dict[str, Any]) -> dict[str, Any]:
    """Convert GGUF weights to fp32; transformers without GgufConfig always does."""
    if "gguf_file" in extra and hasattr(transformers, "GgufConfig"):
        return {**extra, "quantization_config": transformers.GgufConfig(dequantize=True)}
    return extra


def _random(architecture: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)


@contextlib.contextmanager
def _loading_errors(option: str, value: str) -> Iterator[None]:
    """Turn the errors of loaders, which may be of any type, into one line (UserError)."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{option} = {value!r} cannot be loaded: {text[:300]}") from error
