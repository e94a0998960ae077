"""Weights of which each process keeps some rows (FSDP2), and their way between processes. Networks decide when."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from forethought.run import distributed
from forethought.run.checkpoint import Saved


def shard(model: Any) -> Any:
    """Deal a network's weights over the processes, in place, layer by layer."""
    mesh = init_device_mesh(model.device.type, (distributed.world_size(),))
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def is_sharded(model: Any) -> bool:
    """Whether a network's weights are dealt over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def gather_into(full: Any, model: Any) -> None:
    """Gather the weights of a sharded network into one that is whole. All processes must ask together."""
    for target, source in zip(full.parameters(), model.parameters(), strict=True):
        with distributed.communication_errors():
            target.copy_(source.full_tensor())


@contextlib.contextmanager
def full_model(model: Any, like: Any, **to: Any) -> Iterator[Any]:
    """A network with all its weights: itself, or for as long as it takes a copy of `like`, filled from its shards.

    `to` says where that copy lies, and in which precision. All processes must ask together.
    """
    if not is_sharded(model):
        yield model
        return
    full = copy.deepcopy(like).requires_grad_(False).to(**to)
    gather_into(full, model)
    yield full


def reduce_scatter(grad: Tensor, master: Any) -> None:
    """Add a gradient up over processes and leave to each the rows of which it keeps the weights."""
    with distributed.communication_errors():
        summed = DTensor.from_local(grad, master.device_mesh, [Partial("sum")], run_check=False)
        master.grad = summed.redistribute(placements=[Shard(0)])


def local_shard(tensor: Any) -> Tensor:
    """The rows that this process keeps; a tensor that is not sharded is its own."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def clip_gradients(parameters: Sequence[Any], limit: float) -> float:
    """Scale gradients to a global norm of `limit` at most; their norm before that, over the rows of all processes."""
    grads = [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
    here = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
    norm = sum(one * one for one in distributed.all_gather(here)) ** 0.5
    for grad in grads:
        grad.mul_(min(limit / (norm + 1e-6), 1.0))  # what torch.nn.utils.clip_grad_norm_ does
    return norm


def local_state(networks: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What this process writes of networks and optimizer: its rows; of all that is not sharded, the first one alone."""
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
    """Read networks and optimizer from a checkpoint of any number of processes, each process the rows that it keeps."""
    for name, tensor in _named(networks).items():
        if name in saved.names:
            local_shard(tensor).copy_(saved.tensor(name, _place(tensor)))
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        start = f"optimizer/{index}/"
        for name in [name for name in saved.names if name.startswith(start)]:
            optimizer.state[parameter][name.removeprefix(start)] = _moment(saved, name, parameter)


def _moment(saved: Saved, name: str, parameter: Any) -> Tensor:
    """Something that the optimizer keeps of a parameter: dealt out as the parameter is, or a number for all of it."""
    if saved.shape(name) != parameter.shape:
        return saved.tensor(name)
    moment = torch.zeros_like(parameter)
    local_shard(moment).copy_(saved.tensor(name, _place(parameter)))
    return moment


def _named(networks: Mapping[str, torch.nn.Module]) -> dict[str, Tensor]:
    """`network/name` of every weight and buffer, without second names of tied ones."""
    named, seen = {}, set()
    for network, module in networks.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                named[f"{network}/{name}"] = tensor
    return named


def _place(tensor: Any) -> slice | None:
    """Which rows this process keeps; None for a tensor that is not sharded."""
    if not isinstance(tensor, DTensor):
        return None
    each = -(-tensor.shape[0] // distributed.world_size())
    start = min(distributed.rank() * each, tensor.shape[0])
    return slice(start, start + len(local_shard(tensor)))
