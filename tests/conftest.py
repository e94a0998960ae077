"""Settings of every test: one thread, every warning every time, the same examples each run."""

import signal

import pytest
import torch
from hypothesis import settings

from helpers.runs import processes

__all__ = ["processes"]

settings.register_profile("forethought", deadline=None, derandomize=True)
settings.load_profile("forethought")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, also in the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def torch_settings() -> None:
    torch.set_num_threads(1)
    torch.set_warn_always(True)  # a warning that comes once per process would fail another test in every order
