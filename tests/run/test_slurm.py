"""The batch script for Slurm: Slurm's commands are replaced, everything that it starts is real."""

import os
import select
import signal
import subprocess
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from forethought.run.folder import read_lines
from helpers.docs import ROOT
from helpers.moments import Moment
from helpers.runs import HANG_S, end, environments, lines, settings, start, words

SCRIPT = ROOT / "examples" / "train.sbatch"
COMMANDS = {
    # all tasks on this machine; the highest status is srun's
    "srun": """
highest=0
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task"; status=$?; ((status > highest)) && highest=$status; done
exit "$highest"
""",
    "scontrol": 'if [ "$1" = show ]; then printf "127.0.0.1\\nother\\n"; else echo "$@" >> requeued; fi',
    # the process itself is forked by the test from one that has everything imported
    "forethought": """
printf '%s\\n' "RANK=$RANK" "LOCAL_RANK=$LOCAL_RANK" "WORLD_SIZE=$WORLD_SIZE" "MASTER_ADDR=$MASTER_ADDR" \
    "MASTER_PORT=$MASTER_PORT" "" "$@" > "started-$RANK"
exit "$(cat "ended-$RANK")"
""",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the script runs as one of Slurm's jobs, with two tasks."""
    for name, body in COMMANDS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for rank in range(2):
        os.mkfifo(tmp_path / f"started-{rank}")
        os.mkfifo(tmp_path / f"ended-{rank}")
    port = next(port for port in (int(environments(2)[0]["MASTER_PORT"]) for _ in range(99)) if port < 60_000)
    job = {"SLURM_JOB_ID": str(port - 20_000), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
    for name, value in {**job, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def submit(
    processes: ForkServerContext, cluster: Path, arguments: list[str], moment: Moment | None = None
) -> tuple[int, list[str]]:
    """Run the script as a job whose processes are ours, and return its exit status and their command."""
    job = subprocess.Popen(["bash", SCRIPT, *arguments], cwd=cluster)
    started, command = [], [""]
    pipes = [os.open(cluster / f"started-{rank}", os.O_RDONLY | os.O_NONBLOCK) for rank in range(2)]
    for rank, pipe in enumerate(pipes):
        assert select.select([pipe], [], [], HANG_S)[0], "the script starts no process"
        os.set_blocking(pipe, True)
        with os.fdopen(pipe) as told:
            variables, command = [*iter(told.readline, "\n")], told.read().splitlines()
        environment = dict(line.strip().split("=", 1) for line in variables)
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        started.append(start(processes, command, environment, cluster / f"errors-{rank}", moment))
    for rank, status in enumerate(end(started)):
        (cluster / f"ended-{rank}").write_text(f"{status}\n")
    return job.wait(HANG_S), command


@pytest.mark.distributed
def test_a_job_that_runs_out_of_time_is_requeued_and_goes_on(cluster: Path, processes: ForkServerContext):
    changes = {"train": {"steps": 3, "checkpoint_every": 100, "log_every": 1}, "evaluate": {"path": ""}}
    _, config, *overrides = words(settings(cluster, "run", "attention", **changes))
    run = str(cluster / "run")
    arguments = [run, config, *[word for word in overrides if not word.startswith("--run=")]]
    moment = Moment(run, forwards=200, number=signal.SIGUSR1)
    status, command = submit(processes, cluster, arguments, moment)
    assert (status, command) == (128 + signal.SIGUSR1, ["train", *arguments[1:], "--run", run]), lines(cluster)
    assert (cluster / "requeued").read_text() == f"requeue {os.environ['SLURM_JOB_ID']}\n"
    stopped = [row["step"] for row in read_lines(cluster / "run" / "metrics.jsonl")]
    assert stopped in ([1], [1, 2])
    status, command = submit(processes, cluster, arguments)
    assert (status, command) == (0, ["train", "--resume", run]), lines(cluster)
    assert [row["step"] for row in read_lines(cluster / "run" / "metrics.jsonl")] == [1, 2, 3]
    status, _ = submit(processes, cluster, arguments)  # a finished run, or any other error, is not tried again
    assert status == 2
    assert (cluster / "requeued").read_text().count("\n") == 1


def test_the_script_is_valid_and_tells_slurm_to_signal_the_processes():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    text = SCRIPT.read_text()
    assert "#SBATCH --signal=USR1@900\n" in text  # B:USR1 would go to the shell alone
    assert "#SBATCH --requeue\n" in text
