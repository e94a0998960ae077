"""A command that must fail, and the line that it prints."""

import pytest

from forethought.cli import main
from forethought.tools.console import printable


def complaint(capsys: pytest.CaptureFixture[str], command: list[str], status: int = 2) -> str:
    """The one line that a command leaves on stderr; it prints nothing else."""
    capsys.readouterr()
    assert main(command) == status
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert printable(line) == line
    assert line.startswith("forethought: ")
    return line.removeprefix("forethought: ")
