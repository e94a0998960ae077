"""Data-parallel training: ranks, collectives, and how work is distributed over them.

`torchrun` and `accelerate launch` start the processes and set their environment. Without them all functions here are
no-ops of a single process. Python objects go through gloo on the CPU, where a rank that died is noticed at once;
weights and gradients go through NCCL if there are GPUs. Importing this module does not import torch.

All ranks see the same files, run folder and options, and read the same windows; each trains on its share of them.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from forethought.config import Config, RunError, UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_BUCKET_BYTES = 2**26  # gradients per all-reduce


class RemoteRankError(RunError):
    """Another rank failed; it reports the reason itself."""


def launcher_rank_and_size() -> tuple[int, int]:
    """Rank and world size from the launcher's environment; (0, 1) without a launcher. Raises UserError."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        return int(rank), int(size)
    except ValueError:
        raise UserError(f"RANK = {rank!r}, WORLD_SIZE = {size!r}: must be integers, set by a launcher") from None


def require_single_process(command: str) -> None:
    """Raise UserError if a single-process command was started in several processes."""
    if launcher_rank_and_size()[1] > 1:
        raise UserError(f"{command} runs in one process; start it without torchrun or accelerate launch")


@contextmanager
def process_group(config: Config) -> Iterator[None]:
    """Join the process group, if a launcher made one, until the work is done. Raises RunError if a rank is missing."""
    launcher_rank, size = launcher_rank_and_size()
    if size == 1 or _group() is not None:
        yield
        return
    import torch
    import torch.distributed

    on_gpu = config.model.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", launcher_rank)))
    timeout = timedelta(seconds=config.parallel.timeout_s)
    with communication_errors():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
    yield
    torch.distributed.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def world_size() -> int:
    """The number of ranks."""
    group = _group()
    return 1 if group is None else group.get_world_size()


def rank() -> int:
    """The rank of this process, from 0."""
    group = _group()
    return 0 if group is None else group.get_rank()


def is_rank0() -> bool:
    """Whether this is rank 0, which prints and writes the run folder."""
    return rank() == 0


def all_gather(value: T) -> list[T]:
    """The values of all ranks, in their order. Raises RunError if a rank is gone."""
    group = _group()
    if group is None:
        return [value]
    values: list[Any] = [None] * group.get_world_size()
    with communication_errors():
        group.all_gather_object(values, value)
    return values


def run_on_all_ranks(work: Callable[[], T]) -> T:
    """Run `work` on every rank and continue only if it succeeded on all of them.

    The first rank that failed raises its own error, the others `RemoteRankError`: one error is reported once.
    """
    if world_size() == 1:
        return work()
    result: Any = None
    error = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    failed = all_gather(error is not None)
    if error is not None and failed.index(True) == rank():
        raise error
    if any(failed):
        raise RemoteRankError(f"process {failed.index(True)} of {world_size()} failed")
    return result


def run_on_rank0(work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0 and wait for it on all ranks; its result on rank 0, None elsewhere. Errors as above."""
    return run_on_all_ranks(lambda: work() if is_rank0() else None)


def rank0_error(error: Exception) -> Exception:
    """What to raise for an error on every rank: the error itself on rank 0, which reports it, else RemoteRankError."""
    return error if is_rank0() else RemoteRankError(str(error))


def balance_load(weights: Sequence[int], bins: int) -> list[list[int]]:
    """Distribute items over bins of about equal weight, greedily: the heaviest first, each into the lightest bin.

    Returns the ascending indices in each bin; no bin is empty if there are enough items.
    Example: weights 5 3 3 1 1 in two bins: [0, 3, 4] and [1, 2].
    """
    assigned: list[list[int]] = [[] for _ in range(bins)]
    loads = [0] * bins
    for item in sorted(range(len(weights)), key=lambda item: (-weights[item], item)):
        lightest = min(range(bins), key=lambda i: (loads[i], len(assigned[i])))
        assigned[lightest].append(item)
        loads[lightest] += weights[item]
    return [sorted(items) for items in assigned]


def shard_indices(weights: Sequence[int]) -> list[int]:
    """The indices of the items of this rank; all of them in a single process."""
    return balance_load(weights, world_size())[rank()]


def any_rank_has_gradient(parameters: Sequence[Any]) -> list[bool]:
    """For each parameter whether any rank has a gradient of it."""
    gathered = all_gather([parameter.grad is not None for parameter in parameters])
    return [any(of_ranks) for of_ranks in zip(*gathered, strict=True)]


def all_reduce_gradients(parameters: "Sequence[torch.Tensor]") -> None:
    """Sum gradients over all ranks, in a few large all-reduces. Parameters without a gradient on any rank keep none."""
    group = _group()
    if group is None:
        return
    import torch

    bucket: list[torch.Tensor] = []
    for parameter, has_gradient in zip(parameters, any_rank_has_gradient(parameters), strict=True):
        if not has_gradient:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(grad.nbytes for grad in bucket) >= _BUCKET_BYTES:
            _all_reduce(bucket)
            bucket = []
    _all_reduce(bucket)


def _all_reduce(tensors: "list[torch.Tensor]") -> None:
    if not tensors:
        return
    import torch

    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with communication_errors():
        torch.distributed.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def _group() -> Any:
    """torch.distributed in an initialized process group, else None."""
    import torch.distributed

    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if initialized else None


@contextmanager
def communication_errors() -> Iterator[None]:
    """Turn what a collective raises when another rank is gone or hangs into one line (RunError)."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        text = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", " ".join(str(error).split())).partition(". ")[0][:200]
        raise RunError(
            f"another process has died, or did not answer within parallel.timeout_s ({text}); nothing is lost up to "
            "the last checkpoint: continue with train --resume, on any number of processes"
        ) from error
