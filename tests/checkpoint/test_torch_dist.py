"""The bytes of torch_dist directories, against torch's own reader and writer."""

from __future__ import annotations

import enum
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties
from torch.distributed.checkpoint.planner import WriteItemType

from megawrap.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, common_bytes
from megawrap.checkpoint.untrusted import Foreign, load_plain
from megawrap.errors import CheckpointError


def rewrite(source: Path, target: Path, *, drop: str = "", add: dict[str, torch.Tensor] | None = None, unstack: bool = False) -> Path:
    """A copy of a directory with a tensor less or more, or with layers under names of their own."""
    target.mkdir()
    reader = TorchDistReader(source, trust=True)
    with TorchDistWriter(target) as writer:
        for key in reader.shapes:
            tensor = reader.read(key)
            if key == drop:
                continue
            if unstack and "decoder.layers." in key:
                for layer in range(tensor.size(0)):
                    writer.write(key.replace("decoder.layers.", f"decoder.layers.{layer}."), tensor[layer])
            else:
                writer.write(key, tensor)
        for key, tensor in (add or {}).items():
            writer.write(key, tensor)
        writer.finish(reader.common())
    return target


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "stacked": torch.randn(3, 8, 4, generator=generator).bfloat16(),
        "matrix": torch.randn(11, 5, generator=generator),
        "transposed": torch.randn(7, 6, generator=generator).t(),
        "part": torch.randn(20, 3, generator=generator)[4:9],
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
    }


@pytest.fixture
def written(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    with TorchDistWriter(tmp_path, file_bytes=900) as writer:
        for key, tensor in tensors.items():
            if key == "stacked":
                for layer in (2, 0, 1):
                    writer.write(key, tensor[layer], layer, 3)
            else:
                writer.write(key, tensor)
        writer.write_empty("module._extra_state/shard_0_1")
        writer.finish({"args": Namespace(num_layers=3), "iteration": 5})
    return tmp_path


def test_written_tensors_are_read_by_torch(written: Path, tensors: dict[str, torch.Tensor]) -> None:
    state = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    dcp.load(state, checkpoint_id=str(written), no_dist=True)
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors.items())
    assert len(list(written.glob("*.distcp"))) > 1


def test_written_tensors_are_read_back_whole_and_by_layer(written: Path, tensors: dict[str, torch.Tensor]) -> None:
    reader = TorchDistReader(written, trust=True)
    assert reader.keys() == {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    assert reader.objects() == ["module._extra_state/shard_0_1"]
    assert reader.common() == {"args": Namespace(num_layers=3), "iteration": 5}
    for key, tensor in tensors.items():
        found = reader.read(key)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
        for index in range(tensor.size(0) if tensor.dim() else 0):
            assert torch.equal(reader.read(key, index), tensor[index])


def test_what_torch_writes_is_read(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    dcp.save(dict(tensors), checkpoint_id=str(tmp_path), no_dist=True)
    reader = TorchDistReader(tmp_path, trust=True)
    for key, tensor in tensors.items():
        assert torch.equal(reader.read(key), tensor)
        if tensor.dim() and tensor.size(0):
            assert torch.equal(reader.read(key, tensor.size(0) - 1), tensor[-1])


def test_any_box_of_a_tensor_cut_into_a_grid_is_read(tmp_path: Path) -> None:
    full = torch.arange(6 * 8 * 5, dtype=torch.float32).view(6, 8, 5)
    with TorchDistWriter(tmp_path) as writer:
        for i in range(0, 6, 2):
            for j in range(0, 8, 4):
                writer.write_chunk("grid", full[i : i + 2, j : j + 4], (i, j, 0), full.shape)
        writer.finish({})
    reader = TorchDistReader(tmp_path, trust=True)
    for offsets in [(0, 0, 0), (1, 3, 2), (3, 5, 4), (5, 0, 1)]:
        for sizes in [(1, 1, 1), (1, 3, 1), (6, 8, 5), (2, 5, 3)]:
            box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            if all(o + s <= n for o, s, n in zip(offsets, sizes, full.shape, strict=True)):
                assert torch.equal(reader.read_slice("grid", offsets, sizes), full[box])
            else:
                with pytest.raises(CheckpointError, match="grid"):
                    reader.read_slice("grid", offsets, sizes)


def test_reading_a_layer_reads_only_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megawrap.checkpoint import torch_dist

    layers, rows, columns = 32, 64, 64
    dcp.save({"stacked": torch.randn(layers, rows, columns)}, checkpoint_id=str(tmp_path), no_dist=True)
    counted: list[int] = []
    original = torch_dist._read_into
    monkeypatch.setattr(torch_dist, "_read_into", lambda f, p, t: (counted.append(t.nbytes), original(f, p, t)))
    TorchDistReader(tmp_path, trust=True).read("stacked", 17)
    assert counted == [rows * columns * 4]


def test_the_same_calls_give_the_same_bytes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with TorchDistWriter(tmp_path / name) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor)
            writer.finish({"iteration": 1})
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_incomplete_or_contradictory_writing_is_a_defect(tmp_path: Path) -> None:
    with TorchDistWriter(tmp_path) as writer:
        writer.write("stacked", torch.ones(2), 0, 3)
        with pytest.raises(ValueError, match="stacked"):
            writer.write("stacked", torch.ones(2), 0, 3)
        with pytest.raises(ValueError, match="stacked"):
            writer.write("stacked", torch.ones(3), 1, 3)
        with pytest.raises(ValueError, match="stacked"):
            writer.write("stacked", torch.ones(2).bfloat16(), 1, 3)
        with pytest.raises(ValueError, match="stacked"):
            writer.finish({})
    with pytest.raises(TypeError, match="plain"):
        common_bytes({"path": Path("x")})


def test_a_directory_without_manifest_needs_trust(written: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest.json.*--trust"):
        TorchDistReader(written)


def test_damage_is_refused_by_file_name(written: Path) -> None:
    files = [".metadata", "common.pt", "__0_0.distcp"]
    for name in files:
        content = (written / name).read_bytes()
        for damaged in (content[: len(content) // 2], b"", bytes(len(content))):
            (written / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=name) as caught:
                reader = TorchDistReader(written, trust=True)
                reader.common()
                for key in reader.shapes:
                    reader.read(key)
            assert caught.value.exit_code == 3
        (written / name).write_bytes(content)
    (written / "__0_1.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_1.distcp is missing"):
        TorchDistReader(written, trust=True)


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "a/../../b", "link.distcp"])
def test_files_outside_the_directory_are_refused(written: Path, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_bytes(bytes(10_000))
    (written / "link.distcp").symlink_to(secret)
    metadata = pickle.loads((written / ".metadata").read_bytes())  # written by this test's own fixture
    next(iter(metadata.storage_data.values())).relative_path = name
    (written / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"plain relative path|leads outside"):
        TorchDistReader(written, trust=True)


class _AsPython311Did(pickle.Pickler):
    """Members of enumerations by name through getattr, as the releases 3.11.0 to 3.11.3 of Python write them."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_enumerations_of_early_python_3_11_are_read(written: Path, tensors: dict[str, torch.Tensor]) -> None:
    metadata = pickle.loads((written / ".metadata").read_bytes())  # written by this test's own fixture
    with open(written / ".metadata", "wb") as file:
        _AsPython311Did(file).dump(metadata)
    assert b"getattr" in (written / ".metadata").read_bytes()
    reader = TorchDistReader(written, trust=True)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


class _Method:
    def __init__(self, owner: type, name: str) -> None:
        self.asked = owner, name

    def __reduce__(self) -> Any:
        return getattr, self.asked


@pytest.mark.parametrize("asked", [(Metadata, "__init__"), (TensorProperties, "create_from_tensor"), (WriteItemType, "mro")])
def test_getattr_reaches_members_of_enumerations_only(written: Path, asked: tuple[type, str]) -> None:
    (written / ".metadata").write_bytes(pickle.dumps(_Method(*asked)))
    with pytest.raises(CheckpointError, match=rf"asks for attribute '{asked[1]}'"):
        TorchDistReader(written, trust=True)


def test_another_projects_objects_come_back_as_names(tmp_path: Path) -> None:
    from megatron.core.transformer.enums import AttnBackend

    torch.save({"args": Namespace(attention=AttnBackend.flash, layers=2)}, tmp_path / "common.pt")
    args = load_plain(tmp_path / "common.pt")["args"]
    assert isinstance(args.attention, Foreign) and args.attention.name == "megatron.core.transformer.enums.AttnBackend"
    assert args.layers == 2


def test_a_record_that_ends_early_is_refused(written: Path) -> None:
    with zipfile.ZipFile(written / "common.pt", "a") as archive:
        archive.writestr("archive/more", b"x" * 10)
    TorchDistReader(written, trust=True).common()  # an extra member is harmless: the manifest is what notices it
