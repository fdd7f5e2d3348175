"""Models that bring their own code, through the real prepare and the real ranks: what runs is what the plan names."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launcher.errors import PreflightError
from launcher.remotecode import Staged, find_code, read_code, stage
from launcher.rundir import RunDir
from launcher.worker.prepare import prepare
from launcher.worker.staged import check, load_tokenizer, load_weights, model_class
from tests.worker.conftest import Job
from tests.worker.remote_models import write_model

RECIPE = """
model: {{path: {model}, trust_remote_code: true}}
data: {{path: {data}, max_length: 48}}
adapter: {{type: {adapter}}}
train: {{max_steps: 2, lr: 5e-3, global_batch: 4, micro_batch: 2, log_every_steps: 1}}
checkpoint: {{every_steps: 2}}
hardware: 2xcpu
"""


@pytest.fixture
def remote(job: Job, tiny_data: Path, tmp_path: Path) -> Callable[..., Job]:
    """A job whose model brings its code; broken by a change of one file where a test wants that."""

    def made(adapter: str = "lora", **changes: str) -> Job:
        folder = write_model(tmp_path / "model", tokenizer_in_config=True)
        for name, text in changes.items():
            (folder / f"{name}.py").write_text(text)
        job.recipe = tmp_path / "remote.yaml"
        job.recipe.write_text(RECIPE.format(model=folder, data=tiny_data, adapter=adapter))
        return job

    return made


def writable(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def refused(job: Job, run: Path) -> PreflightError:
    """What prepare says, in this process, which has the libraries already."""
    with pytest.raises(PreflightError) as caught:
        prepare(job.plan(), RunDir(run))
    assert caught.value.exit_code == 4
    return caught.value


def test_two_ranks_train_from_read_only_code_after_the_folder_has_changed(
    remote: Callable[..., Job], tmp_path: Path
) -> None:
    job = remote()
    assert job.start() == [0, 0], job.logs()
    assert len(job.losses()) == 2
    code = job.plan().code
    assert code is not None
    folder = job.run.code / code.sha256[:16]
    assert {path.name for path in folder.glob("*.py")} == {file.name for file in code.files}
    assert len(code.files) == 5
    assert not any(writable(path) for path in [folder, *folder.rglob("*")])
    assert {path.name for path in job.run.code.iterdir()} == {folder.name, "no-module-cache"}
    assert not list(job.run.module_cache.iterdir())
    # The answer comes from what was staged, whatever stands in the model folder by now.
    changed = tmp_path / "model" / "modeling_tiny.py"
    changed.write_text("raise SystemExit('this must not run')\n" + changed.read_text())
    done = launch("chat", str(job.folder), "--prompt", "Add 2 and 3", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    # And nothing goes on with other code than it began with.
    done = launch("resume", str(job.folder), "train.max_steps=4")
    assert done.returncode == 4
    assert "+raise SystemExit('this must not run')" in done.stderr


def launch(*argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "launcher", *argv], capture_output=True, text=True, env=env, check=False
    )


def test_an_export_carries_the_code(remote: Callable[..., Job], tmp_path: Path) -> None:
    job = remote("full")
    assert job.start() == [0, 0], job.logs()
    done = launch("export", str(job.folder), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    # `from . import layers_tiny` is what transformers does not follow; said, and no reason to refuse.
    assert "launch loads it right, transformers alone does not" in done.stdout
    exported = find_code(tmp_path / "out")
    planned = job.plan().code
    assert exported is not None
    assert planned is not None
    assert {file.name: file.sha256 for file in exported.files} == {file.name: file.sha256 for file in planned.files}


@pytest.mark.parametrize("name", ["layers_tiny.py", f"__pycache__/layers_tiny.{sys.implementation.cache_tag}.pyc"])
def test_a_rank_executes_no_byte_that_was_not_staged(tmp_path: Path, name: str) -> None:
    staged = staged_from(write_model(tmp_path / "model", mark=name), tmp_path / "code")
    changed = Path(staged.folder, name)
    changed.chmod(0o644)
    changed.write_bytes(changed.read_bytes() + b"\n")
    with pytest.raises(PreflightError, match=r"layers_tiny.* is not what was staged there"):
        model_class(staged)


def test_a_rank_refuses_code_that_the_plan_does_not_name(remote: Callable[..., Job], tmp_path: Path) -> None:
    plan = remote().plan()
    other = staged_from(write_model(tmp_path / "other", mark="other"), tmp_path / "code")
    for staged in (other, None):
        with pytest.raises(PreflightError, match=r"prepare the run again"):
            check(plan, staged)


def test_two_runs_with_different_code_live_in_one_process(tmp_path: Path) -> None:
    marks = {}
    for mark in ("first", "second"):
        folder = write_model(tmp_path / mark / "model", mark)
        marks[mark] = model_class(staged_from(folder, tmp_path / "code")).mark
    assert marks == {"first": "first", "second": "second"}


def staged_from(folder: Path, root: Path) -> Staged:
    code = find_code(folder)
    assert code is not None
    return stage(code, read_code(folder, code), root)


def test_the_staged_classes_give_what_transformers_own_way_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "modeling_tiny.py").write_text(
        # transformers does not see `from . import x`, so its own way cannot load the folder as it is.
        (folder / "modeling_tiny.py")
        .read_text()
        .replace("from . import layers_tiny", "from .layers_tiny import Block")
        .replace("layers_tiny.Block", "Block")
    )
    staged = staged_from(folder, tmp_path / "code")
    ours, tokenizer = load_weights(folder, staged), load_tokenizer(folder, staged)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    plain = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer("Add 2 and 3")["input_ids"] == plain("Add 2 and 3")["input_ids"]
    ids = torch.tensor([tokenizer("Add 2 and 3")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    ("name", "text", "found", "to_type"),
    [
        (
            "layers_tiny",
            "from .configuration_tiny import MARK\nfrom .modeling_tiny import TinyForCausalLM\n",
            "its files import one another in a circle: layers_tiny.py → modeling_tiny.py → layers_tiny.py",
            "move one of these imports into the function that needs it",
        ),
        (
            "text_tiny",
            "from importlib import import_module\nimport_module('no_such_package.part')\n",
            "its code cannot be loaded: text_tiny.py:2: ModuleNotFoundError: No module named 'no_such_package'",
            "pip install no_such_package",
        ),
        (
            "text_tiny",
            "from transformers import NoSuchClass\n",
            "its code cannot be loaded: text_tiny.py:1: ImportError: cannot import name 'NoSuchClass'",
            "it may be written for another transformers",
        ),
        (
            "text_tiny",
            "import pathlib\n(pathlib.Path(__file__).parent.parent / 'kernels.so').write_text('x')\n"
            + "def pieces(text):\n    return list(text)\n",
            "its code writes into the module cache while it is loaded (kernels.so)",
            "take that out of the .py files",
        ),
        ("text_tiny", "import sys\nsys.exit(0)\n", "text_tiny.py:2: SystemExit: 0", "it may be written for another"),
    ],
    ids=["cycle", "third-party", "other transformers", "writes", "exits"],
)
def test_code_that_cannot_be_loaded_ends_in_prepare(
    remote: Callable[..., Job], tmp_path: Path, name: str, text: str, found: str, to_type: str
) -> None:
    error = refused(remote(**{name: text}), tmp_path / "run")
    assert found in error.found
    assert to_type in error.to_type


def test_the_race_benchmark_in_small() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "remote_code_race.py"
    done = subprocess.run(
        [sys.executable, str(script), "--processes", "6", "--rounds", "2", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    for variant in ("ours", "harder"):
        assert (counts[variant]["processes"], counts[variant]["killed"] > 0) == (12, True)
        assert (counts[variant]["failed"], counts[variant]["wrong"]) == (0, 0), counts[variant]
    # transformers' own way runs what lies in the folder when a rank gets there.
    assert counts["plain"]["wrong_late"] > 0


def test_pickled_weights_are_read_as_tensors_only(remote: Callable[..., Job], tmp_path: Path) -> None:
    job, folder = remote(), tmp_path / "model"
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Boom()}, folder / "pytorch_model.bin")
    assert "hold more than tensors: reading them would call posix.system" in refused(job, tmp_path / "run").found
    assert not (tmp_path / "boom").exists()


class _Boom:
    """Runs a program where it is unpickled without care."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch boom",)
