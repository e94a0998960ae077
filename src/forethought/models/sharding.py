"""Weights sharded by rows over the ranks (FSDP2's `fully_shard`), and the collectives that gather and reduce them."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from forethought.config import UserError
from forethought.run import distributed
from forethought.run.checkpoint import Saved


def shard(model: Any) -> Any:
    """Shard the weights of a network over the ranks, in place, layer by layer."""
    mesh = init_device_mesh(model.device.type, (distributed.world_size(),))
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def is_sharded(model: Any) -> bool:
    """Whether the weights of a network are sharded."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def gather_into(full: Any, model: Any) -> None:
    """All-gather the weights of a sharded network into a full one. All ranks must call it together."""
    for target, source in zip(full.parameters(), model.parameters(), strict=True):
        with distributed.communication_errors():
            target.copy_(source.full_tensor())


@contextlib.contextmanager
def full_model(model: Any, like: Any, **to: Any) -> Iterator[Any]:
    """A network with its full weights: itself, or inside the block a copy of `like`, gathered from its shards.

    `to`: the device and dtype of that copy. All ranks must call it together.
    """
    if not is_sharded(model):
        yield model
        return
    full = copy.deepcopy(like).requires_grad_(False).to(**to)
    gather_into(full, model)
    yield full


def reduce_scatter(grad: Tensor, master: Any) -> None:
    """Sum a gradient over the ranks and leave each the rows of its shard."""
    with distributed.communication_errors():
        summed = DTensor.from_local(grad, master.device_mesh, [Partial("sum")], run_check=False)
        master.grad = summed.redistribute(placements=[Shard(0)])


def whole(tensor: Any) -> Tensor:
    """A sharded tensor from all ranks, which must call it together; another one itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Any) -> Tensor:
    """The rows of this rank; the tensor itself if it is not sharded."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def local_state(networks: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What this rank saves of networks and optimizer: its shards, and on rank 0 everything that is not sharded."""
    named = _named(networks)
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        named |= {f"optimizer/{index}/{name}": value for name, value in optimizer.state.get(parameter, {}).items()}
    return {
        name: local_shard(tensor)
        for name, tensor in named.items()
        if isinstance(tensor, DTensor) or distributed.is_rank0()
    }


@torch.no_grad()
def load_state(saved: Saved, networks: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Restore networks and optimizer from a checkpoint of any number of ranks; each rank reads its shards.

    Raises UserError for weights that are missing, unknown or of another shape.
    """
    load_weights(saved, networks)
    states: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        prefix = f"optimizer/{index}/"
        for name in [name for name in saved.names if name.startswith(prefix)]:
            states.setdefault(index, {})[name.removeprefix(prefix)] = _moment(saved, name, parameter)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})  # puts each where its optimizer needs it


@torch.no_grad()
def load_weights(saved: Saved, networks: Mapping[str, torch.nn.Module]) -> None:
    """Restore all weights and buffers of networks. Raises UserError like `load_state`."""
    named = _named(networks)
    held = {name for name in saved.names if name.partition("/")[0] in networks}
    for name in [*named, *sorted(held - named.keys())]:
        found = tuple(saved.shape(name)) if name in held else "missing"
        wanted = tuple(named[name].shape) if name in named else "unknown"
        if found != wanted:
            raise UserError(
                f"checkpoint {saved.path}: {name} is {found}, and {wanted} in the model; give the same model"
            )
    for name, tensor in named.items():
        local_shard(tensor).copy_(saved.tensor(name, _rows_of(tensor)))


def _moment(saved: Saved, name: str, parameter: Any) -> Tensor:
    """Optimizer state of a parameter: sharded like it, or a scalar."""
    if saved.shape(name) != parameter.shape:
        return saved.tensor(name)
    moment = torch.zeros_like(parameter)
    local_shard(moment).copy_(saved.tensor(name, _rows_of(parameter)))
    return moment


def _named(networks: Mapping[str, torch.nn.Module]) -> dict[str, Tensor]:
    """Every weight and buffer as `network/name`; tied ones once."""
    named, seen = {}, set()
    for network, module in networks.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                named[f"{network}/{name}"] = tensor
    return named


def _rows_of(tensor: Any) -> slice | None:
    """Which rows are on this rank; None for a tensor that is not sharded."""
    if not isinstance(tensor, DTensor):
        return None
    rows_per_rank = -(-tensor.shape[0] // distributed.world_size())
    start = min(distributed.rank() * rows_per_rank, tensor.shape[0])
    return slice(start, start + len(local_shard(tensor)))
