"""What a rank writes of a checkpoint: checksums on the way to the disk, tensors that safetensors reads, slices for any world."""

from __future__ import annotations

import hashlib
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.errors import PreflightError
from launcher.manifest import describe_file
from launcher.worker.checkpoint import Staging, files
from launcher.worker.checkpoint.files import Copies, HashedFile, TensorFile, write_tensors
from launcher.worker.checkpoint.slices import Slice, Slices, write_slices

TENSORS = {
    "odd": torch.arange(7, dtype=torch.uint8),
    "half": torch.randn(3, 5).bfloat16(),
    "wide": torch.randn(4, 6),
    "turned": torch.randn(6, 4).T,
    "count": torch.tensor(8.0),
    "none": torch.empty(0, 4),
    "yes": torch.tensor([True, False]),
    "eight": torch.randn(16).to(torch.float8_e4m3fn),
}


def test_tensors_are_read_by_safetensors_and_by_us(tmp_path: Path) -> None:
    folder = Staging(tmp_path)
    folder.tensors("a.safetensors", TENSORS)
    assert folder.error is None
    for read in (
        load_file(tmp_path / "a.safetensors"),
        {n: TensorFile(tmp_path / "a.safetensors").whole(n) for n in TENSORS},
    ):
        assert read.keys() == TENSORS.keys()
        assert all(
            read[name].dtype == tensor.dtype and read[name].shape == tensor.shape for name, tensor in TENSORS.items()
        )
        assert all(torch.equal(read[name].float(), tensor.float()) for name, tensor in TENSORS.items())
    assert folder.files["a.safetensors"] == describe_file(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o044, "colleagues may read it"


def test_values_out_of_the_middle(tmp_path: Path) -> None:
    Staging(tmp_path).tensors("a.safetensors", TENSORS)
    file = TensorFile(tmp_path / "a.safetensors")
    assert torch.equal(file.read("wide", 5, 17), TENSORS["wide"].flatten()[5:17])
    assert torch.equal(file.read("half", 14, 15), TENSORS["half"].flatten()[14:])
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    with pytest.raises(OSError, match="ends within eight"):
        TensorFile(tmp_path / "a.safetensors").whole("eight")


def test_what_the_disk_loses_is_not_in_the_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossy(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data).replace(b"7", b"6"))

    monkeypatch.setattr(Path, "open", lambda path, mode: Lossy(path, mode.replace("b", "")))
    file = HashedFile(tmp_path / "a")
    file.write(b"1234567")
    entry = file.close()
    monkeypatch.undo()
    assert entry.sha256 == hashlib.sha256(b"1234567").hexdigest()
    assert describe_file(tmp_path / "a").sha256 == hashlib.sha256(b"1234566").hexdigest()


def test_files_are_flushed_before_they_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(
        files.os, "fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
    )
    folder = Staging(tmp_path)
    folder.text("a.json", "{}")
    folder.tensors("b.safetensors", TENSORS)
    folder.by_library(lambda aside: (aside / "c.txt").write_text("by somebody else"))
    assert flushed == list(folder.files) == ["a.json", "b.safetensors", "c.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == flushed


def test_what_is_written_later_is_what_was_handed_over(tmp_path: Path) -> None:
    copies = Copies()
    folder = Staging(tmp_path, copies)
    weights = {"w": torch.ones(4)}
    folder.tensors("a.safetensors", weights)
    folder.text("b.json", "{}")
    weights["w"].zero_()
    assert list(tmp_path.iterdir()) == []
    folder.write()
    assert load_file(tmp_path / "a.safetensors")["w"].tolist() == [1.0] * 4
    assert list(folder.files) == ["a.safetensors", "b.json"]
    # The next checkpoint is copied into the same memory, but for what has another shape by then.
    place = copies.of("a.safetensors/w", torch.full((4,), 2.0)).data_ptr()
    assert copies.of("a.safetensors/w", torch.full((4,), 3.0)).data_ptr() == place
    assert copies.of("a.safetensors/w", torch.full((2, 4), 4.0)).tolist() == [[4.0] * 4] * 2


def test_after_an_error_nothing_more_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Staging(tmp_path)
    folder.text("a", "1")
    folder.text("a", "again")  # a file is written once
    folder.text("b", "2")
    folder.by_library(lambda aside: (aside / "c").write_text("3"))
    assert isinstance(folder.error, FileExistsError)
    assert list(folder.files) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_layout_that_is_not_kept_is_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="w was to come as"):
        write_tensors(tmp_path / "a", {"w": (torch.float32, (2,))}, [("w", torch.ones(3))])


def cut(total: int, num_ranks: int, how: str) -> list[tuple[int, int]]:
    """How a strategy cuts `total` values in rows of 4: FSDP by rows, DDP's shares and ZeRO's partitions anywhere."""
    unit = 4 if how == "rows" else 1
    each = -(-total // unit // num_ranks) * unit
    return [(min(rank * each, total), min((rank + 1) * each, total)) for rank in range(num_ranks)]


def test_any_world_reads_what_any_other_wrote(tmp_path: Path) -> None:
    values = {name: torch.randn(rows, 4) for name, rows in (("a.weight", 7), ("b.weight", 3))}
    worlds = list(itertools.product((1, 2, 3, 4), ("rows", "anywhere")))
    for num_ranks, how in worlds:
        path = tmp_path / f"{num_ranks}-{how}"
        path.mkdir()
        for rank in range(num_ranks):
            mine = []
            for name, whole in values.items():
                start, stop = cut(whole.numel(), num_ranks, how)[rank]
                parts = {"exp_avg": whole.flatten()[start:stop], "exp_avg_sq": whole.flatten()[start:stop] ** 2}
                mine.append(Slice(name, tuple(whole.shape), start, parts, {"step": torch.tensor(8.0), "mood": "good"}))
            write_slices(Staging(path), rank, mine)
        slices = Slices(path)
        assert slices.shapes == {"a.weight": (7, 4), "b.weight": (3, 4)}
        assert slices.kinds("a.weight") == ["exp_avg", "exp_avg_sq"]
        assert slices.rest("b.weight") == {"step": torch.tensor(8.0), "mood": "good"}
        for (others, other_how), (name, whole) in itertools.product(worlds, values.items()):
            for start, stop in cut(whole.numel(), others, other_how):
                assert torch.equal(slices.read(name, "exp_avg_sq", start, stop), whole.flatten()[start:stop] ** 2)


def test_values_that_are_in_no_file_are_missed(tmp_path: Path) -> None:
    for rank, (start, stop) in enumerate(((0, 4), (6, 12))):
        write_slices(Staging(tmp_path), rank, [Slice("w", (3, 4), start, {"exp_avg": torch.ones(stop - start)})])
    slices = Slices(tmp_path)
    assert slices.read("w", "exp_avg", 6, 12).tolist() == [1.0] * 6
    with pytest.raises(PreflightError, match="has no exp_avg of w from value 4 of 8 on"):
        slices.read("w", "exp_avg", 0, 8)
    with pytest.raises(PreflightError, match="has no exp_avg of w from value 12 of 13 on"):
        slices.read("w", "exp_avg", 7, 13)


def test_state_without_a_place_in_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="the optimizer's state holds history, a list"):
        write_slices(Staging(tmp_path), 0, [Slice("w", (1,), rest={"history": [1.0]})])
