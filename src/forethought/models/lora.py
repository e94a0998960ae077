"""LoRA (arXiv:2106.09685) with the `peft` library: adapters are trained, the model's own weights are frozen.

The frozen weights are in memory once, in compute precision. What is trained, averaged (the teacher), checkpointed and
communicated between ranks are the factors A and B alone, in fp32.
"""

import copy
import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forethought.config import Config, Lora, UserError
from forethought.models.compute_copy import Network, compute_copy
from forethought.models.loading import device, load_model
from forethought.prefix import attention_only, layers_of

ALL = "all-linear"
ADAPTER = "default"  # peft's name for a model's first adapter


def load_network(config: Config) -> Network:
    """The network that a config trains: all weights of its model, or adapters. Raises UserError."""
    if config.lora.r:
        network = load_with_adapters(config)
    else:
        network = Network(load_model(config.model, config.seed), config.model.precision)
    if config.update.checkpointing and not layers_of(network.model):
        kind = type(network.model).__name__
        raise UserError(f"update.checkpointing = True: {kind} has no layers that can be recomputed")
    if config.update.compile and not (layers_of(network.model) and attention_only(network.model)):
        kind = type(network.model).__name__
        raise UserError(f"update.compile = True: {kind} has other layers than attention and dense MLPs")
    gpu = network.model.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if config.update.attention == "triton" and not (gpu and importlib.util.find_spec("triton")):
        raise UserError("update.attention = 'triton': needs a GPU and the package triton; use update.attention flash")
    return network


def load_with_adapters(config: Config) -> Network:
    """The model of a config, loaded on the CPU, with adapters. Raises UserError."""
    import_peft()
    return add_adapters(load_model(dataclasses.replace(config.model, device="cpu"), config.seed), config)


def load_exported(config: Config, folder: Path) -> Network:
    """The network that a run trained, with its adapters beside the weights: what `export` saved. Raises UserError."""
    network, file = load_with_adapters(config), folder / "adapter" / "adapter_model.safetensors"
    try:
        saved = load_file(file)
        factors = {name: saved[_peft_name(name.replace("/", "."))] for name in network.weights.state_dict()}
        network.weights.load_state_dict(factors)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{str(file)!r} is not the adapter of this run: {text[:300]}") from error
    network.sync()
    return network


def add_adapters(model: Any, config: Config) -> Network:
    """Freeze an fp32 model and add new adapters, with B = 0 so that its outputs do not change. Raises UserError.

    It is moved to its device after the conversion to its precision. The network's weights are fp32 copies of the
    factors.
    """
    inject_adapters(model, config)
    target = device(config.model)
    factors = nn.ParameterDict()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factors[name.replace(".", "/")] = nn.Parameter(parameter.detach().to(target, copy=True))
    return Network(factors, config.model.precision, compute_copy(model, config.model.precision, target))


def import_peft() -> Any:
    """The module `peft`. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UserError(f"lora.r: adapters need the peft library ({error}); pip install 'forethought[lora]'") from None


def inject_adapters(model: Any, config: Config) -> None:
    """Freeze a model and add adapters to its linear layers, in place; their factors A depend on the seed alone."""
    peft, options, layers = import_peft(), config.lora, linear_layers(model)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.r,
        lora_alpha=options.alpha,
        target_modules=target_modules(layers, options),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        base_model_name_or_path=config.model.path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        peft.inject_adapter_in_model(settings, model)
    model.eval()


def linear_layers(model: Any) -> dict[str, Any]:
    """Layers that can have an adapter: all linear ones except the output head and the out_proj of Mamba mixers.

    Mamba's kernels read the weight of out_proj directly, which would bypass an adapter.
    """
    mixers = {name for name, module in model.named_modules() if hasattr(module, "conv1d")}
    out = {model.get_output_embeddings(), *(getattr(model.get_submodule(name), "out_proj", None) for name in mixers)}
    kinds = (nn.Linear, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds) and module not in out}


def target_modules(layers: Mapping[str, Any], options: Lora) -> list[str]:
    """Names of the layers that get an adapter. Raises UserError for a name that matches none."""
    if options.target_modules == (ALL,):
        return list(layers)
    for wanted in options.target_modules:
        if not any(_matches(name, wanted) for name in layers):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UserError(f"lora.target_modules = {wanted!r}: the model's linear layers are {known}, or {ALL}")
    return [name for name in layers if any(_matches(name, wanted) for wanted in options.target_modules)]


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def merged_weights(model: Any, factors: Mapping[str, Tensor], options: Lora, **to: Any) -> dict[str, Tensor]:
    """The weights of the equivalent model without adapters, W + alpha / r * B A, under its own names.

    `factors`: under their names in the model with adapters. `to`: device and dtype of the result. The weights of a
    model without adapters are returned as they are.
    """
    merged, seen = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, adapter, rest = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if id(tensor) not in seen:  # tied weights stay tied
            seen[id(tensor)] = tensor.detach().to(**to)
        plain = seen[id(tensor)]
        if adapter and rest == "weight":
            pair = (factors[f"{owner}.{part}.{ADAPTER}.weight"] for part in ("lora_A", "lora_B"))
            down, up = (factor.detach().to(plain.device, torch.float32) for factor in pair)
            change = (up @ down) * (options.alpha / options.r)  # (out, in)
            change = change.T if model.peft_config[ADAPTER].fan_in_fan_out else change
            plain = (plain.float() + change).to(plain.dtype)  # rounded once
        merged[f"{owner}.{rest}" if adapter else name] = plain
    return merged


def has_full_weight(layer: Any) -> bool:
    """Whether `full_weight` is all that a linear layer multiplies with: it is plain, or has one plain adapter in use.

    With bf16 weights the sum would be rounded to bf16 again, which loses most of what a small B A adds.
    """
    plain = getattr(layer, "base_layer", layer)
    if type(plain) is not nn.Linear or "forward" in vars(plain):
        return False
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    return plain is layer or (
        kind == "peft.tuners.lora.layer.Linear"
        and layer.active_adapters == [ADAPTER]
        and not (layer.merged or layer.disable_adapters or layer.lora_variant or layer.lora_bias[ADAPTER])
        and plain.weight.dtype == torch.float32
    )


def full_weight(layer: Any) -> Tensor:
    """The weight of a linear layer: W, with an adapter W + alpha / r * B A."""
    weight = layer.weight.detach()
    return weight + layer.get_delta_weight(ADAPTER).detach() if hasattr(layer, "base_layer") else weight


def export(model: Any, folder: Path, network: Network, options: Lora) -> None:
    """Save the trained network, whose full weights are those of `model` unless it has adapters.

    With adapters: FOLDER gets the merged fp32 model, which does not need peft, and FOLDER/adapter the peft adapter.
    """
    if not network.has_adapters:
        model.save_pretrained(folder)
        return
    factors = {name.replace("/", "."): factor.detach() for name, factor in network.weights.named_parameters()}
    weights = merged_weights(network.model, factors, options, device="cpu", dtype=torch.float32)
    network.model.save_pretrained(folder, state_dict=weights)
    architecture = copy.deepcopy(network.model.config)
    architecture.dtype = torch.float32
    architecture.save_pretrained(folder)
    settings = copy.copy(network.model.peft_config[ADAPTER])
    settings.target_modules, settings.inference_mode = sorted(settings.target_modules), True
    settings.save_pretrained(folder / "adapter")
    named = {_peft_name(name): factor.cpu() for name, factor in factors.items()}
    save_file(named, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_name(name: str) -> str:
    """The name of a factor in an adapter's file."""
    return f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"
