"""Several processes that train one model: who is who, how work is dealt, and what they tell each other.

`torchrun` and `accelerate launch` start the processes and say so in the environment. One process has nothing to tell.
Small things go through gloo, on the CPU, so that a process that died is noticed at once and in words; weights and
gradients go through NCCL where there are GPUs. Importing this module imports no torch.
"""

import heapq
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
_BUCKET_BYTES = 2**26  # gradients that are added up in one message


class RemoteRankError(RunError):
    """Another process failed, and says why itself."""


def launcher_rank_and_size() -> tuple[int, int]:
    """Number of this process and how many there are, as the launcher says; (0, 1) without one. Raises UserError."""
    words = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, size = (int(word) for word in words)
    except ValueError:
        raise UserError(f"RANK = {words[0]!r}, WORLD_SIZE = {words[1]!r}: a launcher sets whole numbers") from None
    return rank, size


def require_single_process(command: str) -> None:
    """Raise UserError where a command that one process does was started in several."""
    if launcher_rank_and_size()[1] > 1:
        raise UserError(f"{command} runs in one process; start it without torchrun or accelerate launch")


@contextmanager
def process_group(config: Config) -> Iterator[None]:
    """Join the other processes, where there are any, until the work is done. Raises RunError where they do not come."""
    rank_here, count = launcher_rank_and_size()
    if count == 1 or _group() is not None:
        yield
        return
    import torch
    import torch.distributed

    on_gpu = config.model.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank_here)))
    patience = timedelta(seconds=config.parallel.timeout_s)
    with communication_errors():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=patience)
    yield
    torch.distributed.destroy_process_group()  # not after an error: it would wait for processes that are gone


def world_size() -> int:
    """How many processes train together."""
    group = _group()
    return 1 if group is None else group.get_world_size()


def rank() -> int:
    """The number of this process, from 0."""
    group = _group()
    return 0 if group is None else group.get_rank()


def is_rank0() -> bool:
    """Whether this is the process that prints and writes the run folder."""
    return rank() == 0


def all_gather(value: T) -> list[T]:
    """What each process has to say, in their order. Raises RunError where one is gone."""
    group = _group()
    if group is None:
        return [value]
    answers: list[Any] = [None] * group.get_world_size()
    with communication_errors():
        group.all_gather_object(answers, value)
    return answers


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
    """The error that every process meets at the same place, to be raised: told by the first one alone."""
    return error if is_rank0() else RemoteRankError(str(error))


def balance_load(weights: Sequence[int], hands: int) -> list[list[int]]:
    """Deal things out so that each hand holds about the same weight: the heaviest first, each to the lightest hand.

    Returns the indices in each hand, ascending. Hands are never empty where there are enough things.
    Example: weights 5 3 3 1 1 in two hands: [0, 3, 4] and [1, 2].
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    loads = [(0, 0, hand) for hand in range(hands)]
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        load, count, hand = heapq.heappop(loads)
        dealt[hand].append(i)
        heapq.heappush(loads, (load + weights[i], count + 1, hand))
    return [sorted(hand) for hand in dealt]


def shard_indices(weights: Sequence[int]) -> list[int]:
    """The indices that are dealt to this process; all of them where there is one."""
    return balance_load(weights, world_size())[rank()]


def any_rank_has_gradient(parameters: Sequence[Any]) -> list[bool]:
    """For each parameter whether any process has a gradient of it; those without one anywhere are left as they are."""
    answers = all_gather([parameter.grad is not None for parameter in parameters])
    return [any(some) for some in zip(*answers, strict=True)]


def all_reduce_gradients(parameters: "Sequence[torch.Tensor]") -> None:
    """Add up the gradients of all processes, in every process, in a few large messages."""
    group = _group()
    if group is None:
        return
    import torch

    bucket: list[torch.Tensor] = []
    for parameter, known in zip(parameters, any_rank_has_gradient(parameters), strict=True):
        if not known:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(grad.nbytes for grad in bucket) >= _BUCKET_BYTES:
            _sum(bucket)
            bucket = []
    _sum(bucket)


def _sum(tensors: "list[torch.Tensor]") -> None:
    if not tensors:
        return
    import torch

    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with communication_errors():
        torch.distributed.all_reduce(flat)
    for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))


def _group() -> Any:
    """torch.distributed where processes have been joined, else None."""
    import torch.distributed

    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if known else None


@contextmanager
def communication_errors() -> Iterator[None]:
    """Make what a message raises when another process is gone or silent one clear line (RunError)."""
    try:
        yield
    except RuntimeError as error:
        text = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", " ".join(str(error).split())).partition(". ")[0][:200]
        raise RunError(
            f"another process has died, or said nothing for parallel.timeout_s ({text}); nothing is lost since the "
            "last checkpoint: go on with train --resume, with as many processes as you like"
        ) from error
