"""Preprocessing killed, interrupted and out of disk: what is left, and that the same command finishes it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megawrap.data.format import IndexedDataset, marker_path
from megawrap.data.twins import twin_prefixes
from megawrap.errors import EXIT_OK, EXIT_UNFINISHED, EXIT_USAGE, DataError
from tests.preprocessing import OUTPUTS, hashes, left, random_text, run, write_samples
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A prefix in a directory of its own, so that everything that is left behind shows."""
    return tmp_path / "out" / "out"


# Runs trials in forks of one process that has imported everything: argv[1] is a JSON list of {name, out, ...}; prints a
# JSON list of exit statuses. kill_at: SIGKILL itself at the n-th file event; limit: RLIMIT_FSIZE; both None: a clean run.
TRIALS = """
import json, os, resource, signal, sys
from megawrap import preprocess
from megawrap.data import assemble, format, reader, tokenizer
import tokenizers
reader.BLOCK_BYTES = 2000
def child(trial):
    events = 0
    if trial.get("limit") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (trial["limit"], resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    def hook(event, args):
        nonlocal events
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "megawrap.add"):
            events += 1
            if events == trial.get("kill_at"):
                os.kill(os.getpid(), signal.SIGKILL)
    add = format.IndexedWriter.add
    def observed(self, *arrays):
        add(self, *arrays)
        sys.audit("megawrap.add")
    format.IndexedWriter.add = observed
    with open(trial["log"], "w") as log:
        os.dup2(log.fileno(), 2)
    sys.stdout = open(os.devnull, "w")
    sys.addaudithook(hook)
    code = preprocess.main(trial["argv"])
    if trial.get("count"):
        seen = events  # before the file below is one more
        with open(trial["log"] + ".count", "w") as file:
            file.write(str(seen))
    sys.stderr.flush()
    os._exit(code)
statuses = []
for trial in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        child(trial)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(statuses))
"""


def run_trials(trials: list[dict[str, Any]]) -> list[int]:
    done = subprocess.run([sys.executable, "-c", TRIALS, json.dumps(trials)], capture_output=True, text=True, check=True)
    statuses: list[int] = json.loads(done.stdout.splitlines()[-1])
    return statuses


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Enough samples for dozens of blocks, one bad line among them so that the side file is written too."""
    rng = random.Random(10)
    path = write_samples(tmp_path / "data.jsonl", [(random_text(rng), random_text(rng) + "z") for _ in range(600)])
    with path.open("a") as stream:
        stream.write("[]\n")
    return path


def trial(source: Path, tokenizer: Path, out: Path, *flags: str, **options: Any) -> dict[str, Any]:
    out.parent.mkdir(exist_ok=True)
    files = ["--input", str(source), "--tokenizer", str(tokenizer), "--output-prefix", str(out)]
    argv = [*files, "--on-bad-line", "skip", "--workers", "1", *flags]
    return {"argv": argv, "log": str(out.parent.parent / f"{out.parent.name}.log"), **options}


PARTS = ("--part-mib", "0.01", "--dedup", "exact")


@pytest.mark.fault
@pytest.mark.parametrize("flags", [(), ("--twin-files", "targets"), PARTS], ids=["single", "twins", "parts"])
def test_r6_kill_at_thirty_moments_then_the_same_command_again(
    tmp_path: Path, tokenizer: Path, many: Path, flags: tuple[str, ...], record_property: Any
) -> None:
    """R6 for preprocess: the rerun succeeds with no manual step and its files equal a clean run's."""
    clean = tmp_path / "clean" / "out"
    assert run_trials([trial(many, tokenizer, clean, *flags, count=True)]) == [EXIT_OK]
    num_events = int((tmp_path / "clean.log.count").read_text())
    assert num_events > 60
    moments = sorted({*random.Random(11).sample(range(1, num_events + 1), 20), *range(num_events - 9, num_events + 1)})
    outs = [tmp_path / f"killed{moment}" / "out" for moment in moments]
    killed = run_trials([trial(many, tokenizer, out, *flags, kill_at=moment) for out, moment in zip(outs, moments, strict=True)])
    assert killed == [-signal.SIGKILL] * len(moments)
    prefixes = twin_prefixes(Path("out"), "targets") if "--twin-files" in flags else (Path("out"),)
    unfinished = []
    for out in outs:
        complete = [(out.parent / f"{prefix}.manifest.json").exists() for prefix in prefixes]
        unfinished += [out] * (not all(complete) or out.with_name("out.parts").exists())
        for prefix, whole in zip(prefixes, complete, strict=True):
            if whole:
                IndexedDataset(out.parent / prefix).verify()
            else:
                with pytest.raises(DataError):
                    IndexedDataset(out.parent / prefix)
    assert len(unfinished) >= len(moments) - 4
    assert run_trials([trial(many, tokenizer, out, *flags) for out in unfinished]) == [EXIT_OK] * len(unfinished)
    for out in outs:
        assert hashes(out) == hashes(clean)
    record_property("R6", (len(outs), len(moments)))


@pytest.mark.fault
def test_r9_full_disk_at_twenty_offsets(tmp_path: Path, tokenizer: Path, many: Path, record_property: Any) -> None:
    """R9 for preprocess: exit code, path and sizes named, nothing left, what was there before kept."""
    clean = tmp_path / "clean" / "out"
    assert run_trials([trial(many, tokenizer, clean)]) == [EXIT_OK]
    size = clean.with_name("out.bin").stat().st_size
    assert size > clean.with_name("out.idx").stat().st_size
    limits = [size * k // 20 for k in range(20)]
    outs = [tmp_path / f"full{limit}" / "out" for limit in limits]
    for out in outs:
        out.parent.mkdir()
        (out.parent / "old").write_bytes(b"kept")
    statuses = run_trials([trial(many, tokenizer, out, limit=limit) for out, limit in zip(outs, limits, strict=True)])
    for out, limit, status in zip(outs, limits, statuses, strict=True):
        assert left(out) == {"old"}
        if limit == 0:  # not even the message fits
            assert status != EXIT_OK
            continue
        message = (tmp_path / f"full{limit}.log").read_text()
        assert status == EXIT_USAGE, message
        assert message.startswith(f"megawrap: error: cannot write {out.parent}"), message
        assert "bytes" in message or "iB" in message
        assert "Traceback" not in message
    record_property("R9", (len(statuses), len(limits)))


@pytest.mark.fault
def test_full_disk_keeps_finished_parts(tmp_path: Path, tokenizer: Path, many: Path) -> None:
    """Where an input is done in parts, a full disk costs one part: nothing is visible, and the same command goes on."""
    clean = tmp_path / "clean" / "out"
    assert run_trials([trial(many, tokenizer, clean, *PARTS)]) == [EXIT_OK]
    size = clean.with_name("out.bin").stat().st_size
    outs = [tmp_path / f"full{k}" / "out" for k in range(1, 10)]
    statuses = run_trials([trial(many, tokenizer, out, *PARTS, limit=size * k // 10) for k, out in enumerate(outs, start=1)])
    assert statuses == [EXIT_USAGE] * 9
    for out in outs:
        assert left(out) <= {"out.parts"}
        message = (tmp_path / f"{out.parent.name}.log").read_text()
        assert message.startswith(f"megawrap: error: cannot write {out.parent}"), message
    assert run_trials([trial(many, tokenizer, out, *PARTS) for out in outs]) == [EXIT_OK] * 9
    assert [hashes(out) for out in outs] == [hashes(clean)] * 9


INTERRUPTED = """
import os, sys
from megawrap import preprocess
from megawrap.data import format, reader
reader.BLOCK_BYTES = 2000
add = format.IndexedWriter.add
def blocking(self, *arrays):
    add(self, *arrays)
    os.write(1, b"x")
    os.read(0, 1)
format.IndexedWriter.add = blocking
sys.exit(preprocess.main(sys.argv[1:]))
"""


@pytest.mark.fault
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("flags", [(), PARTS], ids=["single", "parts"])
def test_interrupt(tmp_path: Path, tokenizer: Path, many: Path, out: Path, signum: signal.Signals, flags: tuple[str, ...]) -> None:
    """In one go nothing is left; in parts, what is finished, which the same command continues."""
    files = ["--input", str(many), "--tokenizer", str(tokenizer), "--output-prefix", str(out)]
    argv = [*files, "--on-bad-line", "skip", *flags]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.read(1) == "x"  # the first block is written
    assert marker_path(out).exists() or flags
    process.send_signal(signum)
    _, errors = process.communicate()
    if flags:
        assert process.returncode == EXIT_UNFINISHED
        assert f"parts are finished in {out}.parts; the same command continues" in errors
        assert run(many, tokenizer, out, "--on-bad-line", "skip", *flags) == EXIT_OK
        assert left(out) == OUTPUTS | {"out.bad.jsonl"}
        return
    assert process.returncode == 130
    assert errors == "megawrap: interrupted, nothing was written\n"
    assert not out.parent.exists()


def test_failure_in_the_last_step_leaves_nothing(
    tmp_path: Path, tokenizer: Path, many: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megawrap.data.format import IndexedWriter

    original = IndexedWriter.publish

    def obstructed(self: IndexedWriter) -> None:
        out.with_name("out.idx").mkdir()  # someone else's directory takes the name: the second rename fails
        original(self)

    monkeypatch.setattr(IndexedWriter, "publish", obstructed)
    assert run(many, tokenizer, out, "--on-bad-line", "skip") == EXIT_USAGE
    assert "cannot write" in capsys.readouterr().err
    assert left(out) == {"out.idx"}
