"""Preprocess a large input as jobs: `python launch/preprocess.py --input DIR ... --tasks N`.

In: the flags of `megawrap preprocess` and what to ask of the cluster. Out: a SLURM array that shares the parts of the input
and a job that merges them when all are done, the sbatch scripts with --dry-run, or with --cluster local the finished dataset.
The input is checked and divided before anything is submitted; the same command continues what was interrupted.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python put launch/ in front, where this file would hide `preprocess`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.resources import Resources, add_arguments
from megawrap.cli import Parser, run_command
from megawrap.errors import EXIT_OK, ConfigError, MegawrapError

_NOT_SHARED = ("--only-parts", "--plan", "--limit", "-")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(_run, list(sys.argv[1:] if argv is None else argv))


def parser() -> argparse.ArgumentParser:
    """The launcher's own flags; everything else belongs to preprocessing."""
    made = Parser(
        prog="launch/preprocess.py",
        usage="python launch/preprocess.py --tasks N [--dry-run] --input PATH ... --tokenizer DIR --output-prefix PREFIX [...]",
        description=(__doc__ or "").split("\n\n")[1],
        epilog="Every other flag is that of megawrap preprocess; its --help lists them.",
    )
    made.add_argument("--dry-run", action="store_true", help="print the parts and the exact sbatch scripts, and submit nothing")
    made.add_argument("--folder", type=Path, help="job folder; it must not exist (default: PREFIX.jobs/DATE-NUMBER)")
    made.add_argument("--tasks", type=int, default=8, metavar="N", help="jobs, or processes, that share the parts (default: 8)")
    add_arguments(made)
    made.set_defaults(job_name="megawrap-preprocess")
    return made


def _run(argv: list[str]) -> int:
    from launch import preprocess_jobs, submission
    from megawrap import preprocess
    from megawrap.data.assemble import require_free_prefix

    args, rest = parser().parse_known_args(argv)
    resources = Resources(**{item.name: getattr(args, item.name) for item in fields(Resources)})
    problems = resources.problems()
    if resources.world != 1:
        given = f"--nodes {resources.nodes} x {resources.ranks_per_node} tasks"
        problems.append(f"{given}: every job is one process; --tasks {args.tasks} says how many share the input")
    if args.tasks < 1:
        problems.append(f"--tasks is {args.tasks}; it must be 1 or more")
    problems += [f"{flag} is not for jobs that share the input" for flag in _NOT_SHARED if flag in rest]
    wanted = None
    try:
        command = Parser(prog="launch/preprocess.py")
        preprocess.add_arguments(command)
        wanted = command.parse_args(rest)
        preprocess.check_flags(wanted)
    except MegawrapError as error:
        problems.append(str(error))
    if problems or wanted is None:
        raise ConfigError("\n".join(problems) if len(problems) > 1 else problems[0])
    task = preprocess.task_of(wanted)
    plan = preprocess.plan_of(wanted, task)
    tasks = min(args.tasks, len(plan.parts))
    folder = (args.folder or submission.new_folder(plan.prefix.with_name(plan.prefix.name + ".jobs"))).absolute()
    kind = "jobs" if resources.cluster == "slurm" else "processes"
    print(f"{len(plan.parts)} parts, {len(plan.finished())} of them finished, shared by {tasks} {kind}", flush=True)
    if args.dry_run:
        shown = [" ".join(["python -m megawrap.preprocess", *line]) for line in (*preprocess_jobs.shares(rest, tasks), rest)]
        print(preprocess_jobs.scripts(resources, folder, tasks) if resources.cluster == "slurm" else "\n".join(shown), end="")
        return EXIT_OK
    if wanted.restart:
        rest.remove("--restart")
        if plan.folder.exists():
            shutil.rmtree(plan.folder)
    require_free_prefix(task)
    plan.settle()
    if resources.cluster == "debug":
        return preprocess.main(rest)
    if resources.cluster == "local":
        return preprocess_jobs.run_here(rest, tasks, max(1, preprocess.num_cores() // tasks))
    array, merge = preprocess_jobs.submit(resources, rest, folder, tasks)
    print(f"job {array}, {tasks} task(s), then job {merge}, which merges; logs in {folder}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
