"""How fast a checkpoint is committed, verified and read on this machine: `python -m benchmarks.checkpoint [--gib 1]`.

In: a directory on the filesystem to be measured (default: the temporary directory). Out: JSON with GB/s of each step, the
best of several rounds, beside what hashlib alone reaches in memory with the same threads: the limit of verification.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILES = 4


def _rate(num_bytes: int, action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return float(f"{num_bytes / 1e9 / (time.perf_counter() - begin):.3g}")  # a busy machine may take long over little


def measure(directory: Path, num_bytes: int, rounds: int) -> dict[str, float | int]:
    """Rates in GB/s over `num_bytes` of tensors; `directory` is left as it was."""
    import torch

    from megawrap.checkpoint.store import Store
    from megawrap.checkpoint.torch_dist import TorchDistReader, TorchDistWriter

    tensor = torch.randn(num_bytes // FILES // 4)
    threads = max(1, min(8, len(os.sched_getaffinity(0))))

    def write(path: Path) -> list[str]:
        with TorchDistWriter(path, file_bytes=1) as writer:
            for number in range(FILES):
                writer.write(f"tensor_{number}", tensor)
            writer.finish({})
        return writer.files

    def hash_in_memory() -> None:
        view = memoryview(tensor.numpy()).cast("B")
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda _: hashlib.sha256(view).digest(), range(FILES)))

    found: dict[str, list[float]] = {"save": [], "verify": [], "hashlib": [], "read": []}
    for number in range(1, rounds + 1):
        root = Path(tempfile.mkdtemp(dir=directory))
        store = Store(root)
        found["save"].append(_rate(num_bytes, lambda store=store, number=number: store.save(number, write)))
        checkpoint = Store.open(root, verify=False)
        found["verify"].append(_rate(num_bytes, checkpoint.verify))
        found["hashlib"].append(_rate(num_bytes, hash_in_memory))
        reader = TorchDistReader(checkpoint.path)
        found["read"].append(_rate(num_bytes, lambda reader=reader: [reader.read(key) for key in reader.shapes]))
        shutil.rmtree(root)
    best: dict[str, float | int] = {f"{name}_gb_per_s": max(rates) for name, rates in found.items()}
    return {"bytes": num_bytes, "threads": threads, **best, "verify_of_hashlib": round(max(found["verify"]) / max(found["hashlib"]), 3)}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the best counts")
    options = parser.parse_args(argv)
    print(json.dumps(measure(options.directory, int(options.gib * 2**30) // 16 * 16, options.rounds), indent=1))


if __name__ == "__main__":
    main()
