"""What a job asks of the cluster: nodes, tasks, memory, time, and the checks that need no cluster.

In: command-line flags. Out: `Resources`, whose `problems()` are reported before anything is submitted, and the
parameters of submitit's SLURM executor. Values that end up in an sbatch script are matched against what they may hold.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any, Literal

Cluster = Literal["slurm", "local", "debug"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(,[A-Za-z0-9][A-Za-z0-9_.-]*)*")
_HOSTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,\[\]-]*")
_FEATURES = re.compile(r"[A-Za-z0-9_.,&|!*()\[\]-]+")
_MEMORY = re.compile(r"[1-9][0-9]*[KMGT]?B?", re.IGNORECASE)
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d{1,3})(?::(?P<minutes>[0-5]?\d))?(?::(?P<seconds>[0-5]?\d))?")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """One job's request."""

    cluster: Cluster = "slurm"
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int | None = None
    """Ranks per node; default one per GPU, or one where there are none."""
    cpus_per_task: int | None = None
    time: str = "60"
    """Minutes, HH:MM:SS or D-HH:MM:SS."""
    mem: str | None = None
    """Memory per node, for example 64G."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    job_name: str = "megawrap"
    signal_lead: int = 120
    """Seconds before the end of the time limit at which the ranks are told to save."""

    @property
    def ranks_per_node(self) -> int:
        """Tasks of one node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node

    @property
    def minutes(self) -> int | None:
        """The time limit in minutes, rounded up; none when it is malformed."""
        return parse_time(self.time)

    def problems(self) -> list[str]:
        """Everything wrong with the request itself, a sentence each."""
        found = []

        def check(ok: bool, sentence: str) -> None:
            if not ok:
                found.append(sentence)

        for name, low in (("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 1), ("cpus_per_task", 1), ("signal_lead", 0)):
            value = getattr(self, name)
            check(value is None or value >= low, f"{_flag(name)} is {value}; it must be {low} or more")
        allowed = {"partition": _NAME, "account": _NAME, "qos": _NAME, "job_name": _NAME, "constraint": _FEATURES, "nodelist": _HOSTS,
                   "exclude": _HOSTS}  # fmt: skip
        for name, pattern in allowed.items():
            value = getattr(self, name)
            check(value is None or pattern.fullmatch(value) is not None, f"{_flag(name)} is {value!r}; {_ALLOWED[pattern]}")
        check(
            self.mem is None or _MEMORY.fullmatch(self.mem) is not None, f"--mem is {self.mem!r}; it must be a size such as 64G or 512000M"
        )
        minutes = self.minutes
        check(minutes is not None, f"--time is {self.time!r}; it must be minutes, HH:MM:SS or D-HH:MM:SS")
        check(
            minutes is None or minutes * 60 > self.signal_lead,
            f"--time {self.time} is {(minutes or 0) * 60} s, which leaves nothing before the ranks are told to save "
            f"{self.signal_lead} s earlier (--signal-lead)",
        )
        check(self.cluster == "slurm" or self.nodes == 1, f"--nodes is {self.nodes}; --cluster {self.cluster} is this machine alone")
        return found

    def slurm_parameters(self) -> dict[str, Any]:
        """Parameters of submitit's SLURM executor."""
        given: dict[str, Any] = {
            "job_name": self.job_name,
            "nodes": self.nodes,
            "ntasks_per_node": self.ranks_per_node,
            "gpus_per_node": self.gpus_per_node or None,
            "cpus_per_task": self.cpus_per_task,
            "time": self.minutes,
            "mem": self.mem,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "nodelist": self.nodelist,
            "exclude": self.exclude,
            "signal_delay_s": self.signal_lead,
            # a rank that fails would otherwise leave the others waiting until the time limit
            "srun_args": ["--kill-on-bad-exit=1"],
        }
        return {name: value for name, value in given.items() if value is not None}


_ALLOWED = {
    _NAME: "it must be a name of letters, digits, _ . and -, or several of them with commas",
    _FEATURES: "it must be features of letters, digits, _ . - joined by & | , ( ) [ ] !",
    _HOSTS: "it must be host names such as node[1-4],node7",
}


def parse_time(text: str) -> int | None:
    """Minutes of a SLURM time, rounded up: `90`, `1:30:00`, `1-12:00:00`; none when it is none of these or 0."""
    if text.isascii() and text.isdigit():
        return int(text) or None
    match = _TIME.fullmatch(text)
    if match is None or (match["days"] is None and match["minutes"] is None):
        return None
    days, hours, minutes, seconds = (int(match[name] or 0) for name in ("days", "hours", "minutes", "seconds"))
    if match["days"] is None and match["seconds"] is None:  # SLURM reads A:B as minutes and seconds
        days, hours, minutes, seconds = 0, 0, hours, minutes
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return -(-total // 60) or None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `Resources`."""
    defaults = Resources()

    def add(name: str, kind: type, text: str, **options: Any) -> None:
        parser.add_argument(_flag(name), type=kind, default=getattr(defaults, name), help=text, **options)

    add("cluster", str, "where the job runs (default: slurm)", choices=("slurm", "local", "debug"))
    add("nodes", int, "nodes (default: 1)", metavar="N")
    add("gpus_per_node", int, "GPUs of each node, and ranks unless --tasks-per-node says otherwise (default: 0)", metavar="G")
    add("tasks_per_node", int, "ranks of each node (default: one per GPU, or one)", metavar="N")
    add("cpus_per_task", int, "cores of each rank", metavar="N")
    add("time", str, "time limit: minutes, HH:MM:SS or D-HH:MM:SS (default: 60)")
    add("mem", str, "memory of each node, for example 64G")
    for name in ("partition", "account", "qos", "constraint", "nodelist", "exclude"):
        add(name, str, f"SLURM's --{name}")
    add("job_name", str, "name shown by squeue (default: megawrap)")
    add("signal_lead", int, "seconds before the time limit at which the ranks are told to save (default: 120)", metavar="S")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
