"""What a job runs on every rank: the environment torch.distributed reads, then the same `megawrap.finetune` as anywhere.

In: the command line of a fine-tuning run, pickled by submitit, and the variables of SLURM or of submitit's local
executor. Out: the exit code of the task, also written to FOLDER/exit_code.RANK. The checkpoint to start from is found
here, when the job starts, so that a job that is run again resumes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from megawrap.errors import LaunchError


@dataclass(frozen=True)
class Finetune:
    """The task of one rank."""

    argv: tuple[str, ...]
    folder: str

    def __call__(self) -> int:
        """Run this rank; ends the process with the exit code when it is not 0, so that SLURM sees it."""
        os.environ.update(rank_environment(os.environ))
        from megawrap.finetune import main

        code = main(list(self.argv))
        exit_code_path(Path(self.folder), int(os.environ["RANK"])).write_text(str(code))
        sys.stdout.flush()
        if code:
            raise SystemExit(code)
        return code


@dataclass(frozen=True)
class LocalRanks:
    """All ranks of a run as children of this process: what the debug executor runs."""

    argv: tuple[str, ...]
    nproc: int

    def __call__(self) -> int:
        """Exit code of the run."""
        from megawrap import ranks

        return ranks.start("megawrap.finetune", self.argv, self.nproc)


def rank_environment(given: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE and thread count of this task.

    MASTER_ADDR and MASTER_PORT were exported by the batch script. CUDA_VISIBLE_DEVICES stays as SLURM set it: where it
    names fewer devices than the node has tasks, each task was given its own, and counts from 0 again.

    Raises:
        LaunchError: neither SLURM nor submitit's local executor started this process.
    """
    names = {
        "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
        "local": ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS"),
    }.get(given.get("SUBMITIT_EXECUTOR", ""))
    if names is None or any(name not in given for name in names):
        raise LaunchError("this is not a task of a job", hint="Start it with python launch/finetune.py")
    rank, local_rank, world = (given[name] for name in names)
    devices = [device for device in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if devices:
        local_rank = str(int(local_rank) % len(devices))
    found: dict[str, str] = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": world}
    if "OMP_NUM_THREADS" not in given:
        found["OMP_NUM_THREADS"] = given.get("SLURM_CPUS_PER_TASK") or str(_cores_per_rank(given, int(world)))
    return found


def setup_lines(python: str, root: Path) -> list[str]:
    """Lines of the batch script before srun: they run on the first node, once for every start of the job.

    The port is free when the job starts and new at each restart; it is not derived from the job id, which a requeued
    job keeps.
    """
    from shlex import quote

    return [
        f'export PYTHONPATH={quote(str(root))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        'export MASTER_ADDR="$(hostname)"',
        f'export MASTER_PORT="$({quote(python)} -c "from megawrap.ranks import free_port; print(free_port())")"',
    ]


def export_local(environment: MutableMapping[str, str], root: Path) -> None:
    """The same for a job on this machine, whose tasks inherit this process's environment."""
    from megawrap.ranks import free_port

    known = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{known}" if known else str(root)
    environment["MASTER_ADDR"] = "127.0.0.1"
    environment["MASTER_PORT"] = str(free_port())


def exit_code_path(folder: Path, rank: int) -> Path:
    """Where a rank leaves its exit code."""
    return folder / f"exit_code.{rank}"


def _cores_per_rank(given: Mapping[str, str], world: int) -> int:
    on_node = int(given.get("SLURM_NTASKS_PER_NODE") or world)
    return max(1, len(os.sched_getaffinity(0)) // max(1, on_node))
