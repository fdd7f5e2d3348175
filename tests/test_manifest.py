"""Checkpoint folders against their manifests: what may be continued, what is passed over and why."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import manifest
from launcher.manifest import Manifest, best_first, describe_file, folders, newest_valid, newest_whole, verify
from launcher.rundir import RunDir

Change = Callable[[Path], Any]
WEIGHTS = b"weights of step "


@pytest.fixture
def run(tmp_path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


@pytest.fixture
def save(run):
    """Writes checkpoints/step-N as `worker.checkpoint` does: files, one in a folder, and the manifest over them."""

    def saved(step: int, eval_loss: float | None = None) -> Path:
        folder = run.checkpoints / f"step-{step}"
        (folder / "more").mkdir(parents=True)
        (folder / "weights.bin").write_bytes(WEIGHTS + str(step).encode())
        (folder / "more" / "state.json").write_text("{}")
        files = {name: describe_file(folder / name) for name in ("weights.bin", "more/state.json")}
        left = Manifest(
            step=step, epoch=step / 4, rows_key="k", identity={"train.seed": 42}, world={"num_processes": 2},
            eval_loss=eval_loss, files=files,
        ).sealed()  # fmt: skip
        (folder / "manifest.json").write_text(left.model_dump_json(indent=1))
        return folder

    return saved


def change_manifest(folder: Path, **values: Any) -> None:
    """Other values in manifest.json; None takes a key away."""
    path = folder / "manifest.json"
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None or key == "eval_loss"}))


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_with_the_bytes_of_its_manifest_is_valid(save):
    verdict = verify(save(4, eval_loss=2.0))
    assert (verdict.step, verdict.problem) == (4, None)
    assert verdict.manifest is not None
    assert verdict.manifest.eval_loss == 2.0
    assert verdict.manifest.size_bytes == len(WEIGHTS) + 1 + 2


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: flip(folder / "weights.bin"), "weights.bin has other bytes than its manifest says"),
        (lambda folder: flip(folder / "weights.bin", 0), "weights.bin has other bytes than its manifest says"),
        (lambda folder: flip(folder / "more" / "state.json"), "more/state.json has other bytes than its manifest says"),
        (lambda folder: (folder / "weights.bin").write_bytes(WEIGHTS), "weights.bin has 16 of 17 bytes"),
        (lambda folder: (folder / "weights.bin").write_bytes(b""), "weights.bin has 0 of 17 bytes"),
        (lambda folder: (folder / "weights.bin").write_bytes(b"x" * 1234), "weights.bin has 1,234 of 17 bytes"),
        (lambda folder: (folder / "weights.bin").unlink(), "weights.bin is missing"),
        (lambda folder: (folder / "more").rename(folder / "less"), "more/state.json is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest: the save did not finish"),
        (lambda folder: (folder / "manifest.json").write_text(""), "its manifest is torn"),
        (lambda folder: (folder / "manifest.json").write_text('{"step": 4, "fi'), "its manifest is torn"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"), "its manifest is torn"),
        (lambda folder: (folder / "manifest.json").write_text("[4]"), "its manifest is from another version"),
        (lambda folder: change_manifest(folder, mood="good"), "its manifest is from another version"),
        (lambda folder: change_manifest(folder, rows_key=None), "its manifest is from another version"),
        (lambda folder: change_manifest(folder, step=8), "its manifest says step 8"),
        (lambda folder: change_manifest(folder, rows_key="other"), "its manifest is not what was written"),
        (lambda folder: change_manifest(folder, eval_loss=0.1), "its manifest is not what was written"),
    ],
)
def test_a_damaged_checkpoint_says_what_is_wrong_with_it(save, damage: Change, problem):
    folder = save(4)
    damage(folder)
    assert verify(folder).problem == problem


def test_a_file_that_cannot_be_read_is_a_problem_and_no_traceback(save, monkeypatch):
    folder = save(4)

    def broken(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifest, "describe_file", broken)
    assert verify(folder).problem == "weights.bin cannot be read: Input/output error"


def test_a_file_beside_those_of_the_manifest_does_no_harm(save):
    folder = save(4)
    (folder / "notes.txt").write_text("mine")
    assert verify(folder).problem is None


def test_a_folder_that_was_renamed_is_not_the_step_it_says(save):
    folder = save(4)
    assert verify(folder.rename(folder.with_name("step-9"))).problem == "its manifest says step 4"


def test_folders_are_sorted_by_number_and_only_those_of_steps_count(run, save):
    for step in (9, 100, 20):
        save(step)
    for name in (".staging-step-200", "step-300.damaged-1", ".deleting-step-1", "step-", "step-x", "best"):
        (run.checkpoints / name).mkdir()
    assert [folder.name for folder in folders(run)] == ["step-100", "step-20", "step-9"]


def test_a_run_without_checkpoints_has_no_newest(run, tmp_path):
    assert newest_valid(run) == (None, [])
    assert newest_valid(RunDir(tmp_path / "none")) == (None, [])
    assert best_first(RunDir(tmp_path / "none")) == []


def test_the_newest_valid_checkpoint_is_found_and_the_newer_ones_say_why_not(run, save):
    for step in (4, 8, 12, 16):
        save(step)
    flip(run.checkpoints / "step-12" / "weights.bin")
    (run.checkpoints / "step-16" / "manifest.json").unlink()
    flip(run.checkpoints / "step-4" / "weights.bin")  # older: nobody looks
    (run.checkpoints / "step-20").write_text("a file, not a folder")
    assert newest_whole(run) == run.checkpoints / "step-12", "a look goes by sizes"
    chosen, skipped = newest_valid(run)
    assert chosen is not None
    assert (chosen.step, chosen.folder, chosen.problem) == (8, run.checkpoints / "step-8", None)
    assert [(verdict.step, verdict.problem) for verdict in skipped] == [
        (20, "it has no manifest: the save did not finish"),
        (16, "it has no manifest: the save did not finish"),
        (12, "weights.bin has other bytes than its manifest says"),
    ]


def test_a_manifest_of_another_run_seals_other_bytes(run, save, tmp_path):
    folder, before = save(4), save(2)
    (folder / "weights.bin").rename(tmp_path / "kept")
    (folder / "weights.bin").write_bytes(WEIGHTS + b"5")
    foreign = {name: describe_file(folder / name) for name in ("weights.bin", "more/state.json")}
    (tmp_path / "kept").replace(folder / "weights.bin")
    left = Manifest.model_validate_json((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(left.model_copy(update={"files": foreign}).sealed().model_dump_json())
    chosen, skipped = newest_valid(run)
    assert chosen is not None
    assert chosen.folder == before
    assert [verdict.problem for verdict in skipped] == ["weights.bin has other bytes than its manifest says"]


def test_a_folder_of_another_run_is_passed_over_where_there_is_one_of_this(run, save):
    save(4)
    stranger = save(8)
    left = Manifest.model_validate_json((stranger / "manifest.json").read_text())
    changed = left.model_copy(update={"identity": {"train.seed": 7}}).sealed()
    (stranger / "manifest.json").write_text(changed.model_dump_json())
    chosen, skipped = newest_valid(run, {"train.seed": 42, "adapter.r": 8})
    assert chosen is not None
    assert chosen.step == 4
    assert [verdict.problem for verdict in skipped] == ["it is of another run, with other values in its recipe"]
    chosen, skipped = newest_valid(run, {"train.seed": 9})
    assert chosen is not None
    assert (chosen.step, skipped) == (8, []), "then the recipe has changed, and the newest one says how"


def test_where_all_are_damaged_all_are_named(run, save):
    for step in (4, 8):
        (save(step) / "weights.bin").unlink()
    chosen, skipped = newest_valid(run)
    assert chosen is None
    assert [verdict.step for verdict in skipped] == [8, 4]


def test_the_best_comes_first_and_of_two_equals_the_earlier(run, save):
    for step, loss in ((4, 2.5), (8, 2.0), (12, 2.25), (16, 2.0), (100, 2.0), (20, None)):
        save(step, loss)
    (save(24, 1.0) / "manifest.json").write_text('{"eval_loss": 1')
    (save(28, 1.0) / "manifest.json").unlink()
    assert [(loss, folder.name) for loss, folder in best_first(run)] == [
        (2.0, "step-8"),
        (2.0, "step-16"),
        (2.0, "step-100"),
        (2.25, "step-12"),
        (2.5, "step-4"),
    ]


def test_a_loss_that_was_no_number_is_never_the_best(run, save):
    save(4, float("nan"))
    save(8, float("inf"))
    save(12, 3.0)
    assert [folder.name for _, folder in best_first(run)] == ["step-12"]


def test_the_description_of_a_file_is_its_size_and_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    entry = describe_file(tmp_path / "a")
    assert entry.size_bytes == 3
    assert entry.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
