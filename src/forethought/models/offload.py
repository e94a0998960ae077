"""What is idle while thoughts are sampled, in pinned host memory for that time (update.offload)."""

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from forethought.config import UserError
from forethought.models.sharding import local_shard

DEVICES = ("cuda",)
"""Devices whose tensors are moved: those of a CPU are in host memory already."""

_Bytes = UInt8[Tensor, " byte"]


class Offload:
    """Moves the weights of networks and an optimizer's moments to the host and back, bit for bit.

    Tensors stay the same objects: only their storage is freed, and allocated again. Copies to the host run beside what
    follows a step, on a stream of their own; the moments come back beside scoring and update. A copy that was not
    changed since is not made again. All methods may be interrupted, and `back` continued, at any point.
    """

    def __init__(self, device: torch.device, networks: Sequence[torch.nn.Module], optimizer: Any):
        self.networks, self.optimizer = networks, optimizer
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host: list[_Bytes] = []  # pinned; of weights first, then of moments, which the first step creates
        self._pairs: list[tuple[_Bytes, _Bytes]] = []  # bytes of each storage and their copy on the host
        self._away: list[tuple[_Bytes, _Bytes]] = []  # of these, what may have no storage
        self._moments, self._copied = 0, False

    def start(self) -> None:
        """Begin to copy to the host. Nothing may change after that without `settle`. Raises UserError."""
        weights = _storages([one for network in self.networks for one in network.parameters()])
        state = self.optimizer.state
        moments = _storages([one for values in state.values() for one in values.values() if one.dim()])
        found, self._moments = weights + moments, len(moments)
        for storage in found[len(self._host) :]:
            self._host.append(_pinned(storage))
        self._pairs = list(zip(found, self._host, strict=True))
        with self._beside():
            for storage, host in self._pairs:
                host.copy_(storage, non_blocking=True)
        self._copied = True

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Free the memory of all of it inside the block."""
        if not self._copied:
            self.start()
        self._wait()
        try:
            self._away = list(self._pairs)
            for storage, _ in self._away:
                storage.untyped_storage().resize_(0)
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold what was sampled with, in the memory that is needed
            raise
        finally:
            self.back()

    def back(self) -> None:
        """Bring back what is away. The weights may be read after that; the moments only after `ready`."""
        for storage, _ in self._away:
            if not storage.untyped_storage().nbytes():
                storage.untyped_storage().resize_(storage.numel())
        for left in (self._moments, 0):
            with self._beside():
                while len(self._away) > left:
                    storage, host = self._away[0]
                    storage.copy_(host, non_blocking=True)
                    del self._away[0]
            if left == self._moments:
                self._wait()

    def ready(self) -> None:
        """Let all of it be read."""
        self.back()
        self._wait()

    def settle(self) -> None:
        """Let all of it be read and changed."""
        self.ready()
        self._copied = False

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of copies, after all that was queued so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def _wait(self) -> None:
        """What is queued from here on comes after all copies so far; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def _storages(tensors: Sequence[Tensor]) -> list[_Bytes]:
    """The bytes of each storage of some tensors, once; of sharded ones those of this rank. Mapped files stay."""
    found = {}
    for tensor in tensors:
        storage = local_shard(tensor).untyped_storage()
        if storage.nbytes() and storage.resizable():
            found[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return list(found.values())


def _pinned(storage: _Bytes) -> _Bytes:
    try:
        return torch.empty_like(storage, device="cpu", pin_memory=storage.is_cuda)
    except RuntimeError as error:
        what = f"{storage.nbytes / 1e9:.1f} GB more of host memory cannot be pinned"
        raise UserError(f"update.offload = True: {what} ({str(error).partition(chr(10))[0]})") from error
