"""Submit a fine-tuning run: `python launch/finetune.py --config RECIPE.yaml --nodes N --gpus-per-node G`.

In: a recipe, overrides, and what to ask of the cluster. Out: a job id, the sbatch script with --dry-run, or with
--cluster local|debug the exit code of a run on this machine. Configuration and request are checked before submission;
the job runs `megawrap.finetune` with the same arguments, one task per rank, and finds its checkpoint when it starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python put launch/ in front, where this file would hide `finetune`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.resources import Resources, add_arguments
from megawrap.cli import Parser, run_command
from megawrap.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(_run, list(sys.argv[1:] if argv is None else argv))


def parser() -> argparse.ArgumentParser:
    """The launcher's own flags; everything else belongs to the run."""
    made = Parser(
        prog="launch/finetune.py",
        usage="python launch/finetune.py --config RECIPE.yaml --nodes N --gpus-per-node G [--dry-run] [--SECTION.FIELD VALUE ...]",
        description=(__doc__ or "").split("\n\n")[1],
        epilog="Every other flag is the run's; megawrap finetune --help lists them.",
    )
    made.add_argument("--dry-run", action="store_true", help="print the exact sbatch script and submit nothing")
    made.add_argument("--folder", type=Path, help="job folder; it must not exist (default: RUN/jobs/DATE-NUMBER)")
    add_arguments(made)
    return made


def _run(argv: list[str]) -> int:
    from launch import submission
    from megawrap import arguments
    from megawrap.parallel import Layout

    args, rest = parser().parse_known_args(argv)
    resources = Resources(**{item.name: getattr(args, item.name) for item in fields(Resources)})
    problems = resources.problems()
    config = None
    try:
        config, options = arguments.parse(rest, prog="launch/finetune.py")
        if options.print_config:
            print(arguments.to_yaml(config), end="")
            return 0
    except ConfigError as error:
        problems.append(str(error))
    if config is not None and not problems:
        layout = Layout.from_config(config.parallel, resources.world)
        rows = config.train.micro_batch_size * layout.dp
        if config.train.global_batch_size % rows:
            problems.append(
                f"train.global_batch_size {config.train.global_batch_size} is not a multiple of "
                f"micro_batch_size {config.train.micro_batch_size} x dp {layout.dp} = {rows}"
            )
    if problems or config is None:
        raise ConfigError("\n".join(problems) if len(problems) > 1 else problems[0])
    folder = (args.folder or submission.new_folder(Path(config.run))).absolute()
    if args.dry_run:
        if resources.cluster == "slurm":
            print(submission.sbatch_script(resources, folder), end="")
        else:
            print(f"{resources.world} rank(s) on this machine: python -m megawrap.finetune {' '.join(rest)}")
        return 0
    if resources.cluster != "slurm":
        return submission.run_here(resources, rest, folder)
    job_id = submission.submit(resources, rest, folder)
    print(f"job {job_id}, {resources.world} rank(s) on {resources.nodes} node(s); logs in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
