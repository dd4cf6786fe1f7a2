"""From a request to a running job: the job folder, the sbatch script, submission, and the verdict of a local job.

In: `Resources` and the command line of a run. Out: a job id, or the exit code of a job on this machine. Every
submission has a folder of its own, readable by its owner alone: submitit pickles there, and job ids are used again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch import job
from launch.resources import Resources
from megawrap.errors import EXIT_OK, EXIT_UNFINISHED, LaunchError

ROOT = Path(__file__).resolve().parents[1]
_SBATCH_TIMEOUT_SECONDS = "60"  # sbatch retries for minutes against a controller that is down
_TAIL_LINES = 30


def new_folder(run: Path) -> Path:
    """A name for one submission below the run directory; nothing is made yet."""
    return (run / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}").absolute()


def make_folder(folder: Path) -> None:
    """Make the job folder, for its owner alone.

    Raises:
        LaunchError: others may write where it would stand, so they could replace what the job unpickles.
    """
    parent = next(place for place in folder.parents if place.exists())
    mode = parent.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise LaunchError(f"{parent} is writable by everyone, and the job folder {folder} would stand in it", hint=f"chmod o-w {parent}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise LaunchError(f"job folder {folder} exists; each submission needs its own", hint="Choose another --folder") from None


def sbatch_script(resources: Resources, folder: Path) -> str:
    """The script `submit` hands to sbatch, byte for byte."""
    executor = slurm_executor(resources, folder, job.setup_lines(sys.executable, ROOT))
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(resources: Resources, argv: Sequence[str], folder: Path) -> str:
    """Submit to SLURM; returns the job id.

    Raises:
        LaunchError: there is no SLURM here, or it refuses the job, with what it said.
    """
    require_slurm()
    make_folder(folder)
    executor = slurm_executor(resources, folder, job.setup_lines(sys.executable, ROOT))
    try:
        return executor.submit(job.Finetune(tuple(argv), str(folder))).job_id
    except Exception as error:  # submitit raises its own classes around what sbatch printed
        shutil.rmtree(folder, ignore_errors=True)
        raise LaunchError(
            f"sbatch did not take the job: {' '.join(str(error).split())[-600:]}", hint="See the script with --dry-run"
        ) from error


def require_slurm() -> None:
    """Refuse to submit where there is nothing to submit to.

    Raises:
        LaunchError: sbatch or srun is missing.
    """
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise LaunchError(
            f"{' and '.join(missing)} not found: this is not a SLURM machine", hint="Use --cluster local, or --dry-run to see the script"
        )


def run_here(resources: Resources, argv: Sequence[str], folder: Path) -> int:
    """Run the job on this machine, wait for it, and return its exit code.

    `local` is submitit's local executor, one process per rank with logs in the folder; `debug` runs the ranks as
    children of this process with their output passed through.
    """
    import submitit

    if resources.cluster == "debug":
        if resources.world == 1:
            return _in_this_process(argv)
        with _environment():
            job.export_local(os.environ, ROOT)
            return job.LocalRanks(tuple(argv), resources.world)()
    make_folder(folder)
    with _environment():
        job.export_local(os.environ, ROOT)
        executor = submitit.LocalExecutor(folder)
        visible = tuple(int(name) for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.isdigit())
        executor.update_parameters(
            tasks_per_node=resources.ranks_per_node, gpus_per_node=resources.gpus_per_node, timeout_min=resources.minutes,
            signal_delay_s=resources.signal_lead, **({"visible_gpus": visible} if visible and resources.gpus_per_node else {}),
        )  # fmt: skip
        started: Any = executor.submit(job.Finetune(tuple(argv), str(folder)))
    print(f"job {started.job_id}, {resources.world} rank(s), logs in {folder}", flush=True)
    with contextlib.suppress(Exception):  # a failed task is told below, first rank first
        started.wait()
    return _verdict(folder, started.job_id, resources.world)


def slurm_executor(resources: Resources, folder: Path, setup: Sequence[str]) -> Any:
    """submitit's executor for a request; `setup` are lines of the batch script before srun."""
    from submitit import SlurmExecutor

    class Executor(SlurmExecutor):
        """SLURM's executor that can also be made where SLURM is not, to show the script."""

        @classmethod
        def affinity(cls) -> int:
            return 2

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            return ["timeout", _SBATCH_TIMEOUT_SECONDS, "sbatch", str(submission_file_path)]

    Executor.__name__ = "SlurmExecutor"  # submitit names the cluster after the class
    executor = Executor(folder)
    executor.update_parameters(**resources.slurm_parameters(), wckey=None, setup=list(setup))
    return executor


def _in_this_process(argv: Sequence[str]) -> int:
    from megawrap.finetune import main

    return main(list(argv))


def _verdict(folder: Path, job_id: str, world: int) -> int:
    """Exit code of a finished local job; names the first failing rank with the tail of its log."""
    codes: dict[int, int | None] = {}
    when: dict[int, float] = {}
    for rank in range(world):
        path = job.exit_code_path(folder, rank)
        codes[rank] = int(path.read_text()) if path.exists() else None
        log = folder / f"{job_id}_{rank}_log.err"
        when[rank] = path.stat().st_mtime if path.exists() else log.stat().st_mtime if log.exists() else 0.0
    bad = [rank for rank, code in codes.items() if code not in (EXIT_OK, EXIT_UNFINISHED)]
    if not bad:
        print(_tail(folder / f"{job_id}_0_log.out"), flush=True)
        return EXIT_UNFINISHED if EXIT_UNFINISHED in codes.values() else EXIT_OK
    told = [rank for rank in bad if codes[rank] is not None] or bad  # ranks that were ended from outside left no code
    first = min(told, key=lambda rank: when[rank])
    code = codes[first] or 1
    print(_tail(folder / f"{job_id}_{first}_log.err"), file=sys.stderr)
    print(f"megawrap: rank {first} of {world} failed first, exit code {code}; logs in {folder}", file=sys.stderr, flush=True)
    return code


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with open(path, errors="replace") as file:
        return "".join(deque(file, _TAIL_LINES)).rstrip()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Changes to the environment inside are undone outside."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
