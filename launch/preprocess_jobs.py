"""Jobs that share the parts of a preprocessing run: a SLURM array and the job that merges, or processes on this machine.

In: the command line of `megawrap preprocess`, and the request. Out: job ids, the scripts, or an exit code. A task that is
stopped by its time limit or preempted is put back into the queue: finished parts are not done again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import job, submission
from launch.resources import Resources
from megawrap.errors import EXIT_OK, LaunchError


@dataclass(frozen=True)
class Preprocess:
    """What one task runs."""

    argv: tuple[str, ...]

    def __call__(self) -> int:
        """Run the command; ends the process with the exit code when it is not 0, so that SLURM sees it."""
        from megawrap.preprocess import main

        code = main(list(self.argv))
        sys.stdout.flush()
        if code:
            raise SystemExit(code)
        return code

    def checkpoint(self) -> Any:
        """What submitit puts back into the queue when the task is stopped: the same, which continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def shares(argv: Sequence[str], tasks: int) -> list[tuple[str, ...]]:
    """The command line of every task."""
    return [(*argv, "--only-parts", f"{number}/{tasks}") for number in range(tasks)]


def scripts(resources: Resources, folder: Path, tasks: int) -> str:
    """Both scripts `submit` hands to sbatch, byte for byte but for the job id that the second waits for."""
    array, merge = _array(resources, folder, tasks), _merge(resources, folder, "ARRAY_ID")
    if tasks > 1:
        array.parameters["map_count"] = tasks  # as submitit sets it when it submits several tasks
    return "\n".join(executor._make_submission_file_text(executor._submitit_command_str, "") for executor in (array, merge))


def submit(resources: Resources, argv: Sequence[str], folder: Path, tasks: int) -> tuple[str, str]:
    """Submit the array, and the job that merges when every task of it ended well; returns both job ids.

    Raises:
        LaunchError: there is no SLURM here, or it refuses a job, with what it said.
    """
    submission.require_slurm()
    submission.make_folder(folder)
    try:
        array = _array(resources, folder, tasks)._internal_process_submissions(_delayed(shares(argv, tasks)))
        array_id = array[0].job_id.partition("_")[0]
        merge = _merge(resources, folder, array_id)._internal_process_submissions(_delayed([tuple(argv)]))
    except Exception as error:  # submitit raises its own classes around what sbatch printed
        shutil.rmtree(folder, ignore_errors=True)
        said = " ".join(str(error).split())[-600:]
        raise LaunchError(f"sbatch did not take the job: {said}", hint="See the scripts with --dry-run") from error
    return array_id, merge[0].job_id


def _delayed(lines: Sequence[tuple[str, ...]]) -> list[Any]:
    from submitit.core.utils import DelayedSubmission

    return [DelayedSubmission(Preprocess(line)) for line in lines]


def _array(resources: Resources, folder: Path, tasks: int) -> Any:
    executor = _executor(resources, folder / "parts")
    executor.update_parameters(array_parallelism=tasks)
    return executor


def _merge(resources: Resources, folder: Path, array_id: str) -> Any:
    executor = _executor(resources, folder / "merge")
    executor.update_parameters(additional_parameters={"dependency": f"afterok:{array_id}", "kill_on_invalid_dep": "yes"})
    return executor


def _executor(resources: Resources, folder: Path) -> Any:
    python_path = job.setup_lines(sys.executable, submission.ROOT)[:1]
    return submission.slurm_executor(resources, folder, python_path)


def run_here(argv: Sequence[str], tasks: int, workers: int) -> int:
    """Share the parts among processes on this machine, then merge; returns the exit code of the first that failed.

    Args:
        argv: of the whole run.
        tasks: processes.
        workers: tokenizing threads of each.
    """
    threads = () if "--workers" in argv else ("--workers", str(workers))
    command = [sys.executable, "-m", "megawrap.preprocess"]
    started = [subprocess.Popen([*command, *line, *threads], env=_environment()) for line in shares(argv, tasks)]
    try:
        codes = [process.wait() for process in started]
    except BaseException:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        raise
    failed = [code for code in codes if code != EXIT_OK]
    return failed[0] if failed else subprocess.run([*command, *argv], env=_environment(), check=False).returncode


def _environment() -> dict[str, str]:
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{submission.ROOT}{os.pathsep}{known}" if known else str(submission.ROOT)}
