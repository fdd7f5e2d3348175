"""`launch RECIPE --rehearse`: every shipped recipe with its own ranks and strategy on this machine's CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from launcher import manifest
from launcher.recipe.shipped import recipes
from launcher.rundir import RunDir, read_json
from tests.e2e.conftest import Launcher
from tests.worker.remote_models import write_model

SHIPPED = sorted(path.stem for path in recipes())
REMOTE = """
model: {{path: {model}, trust_remote_code: true, dtype: fp32}}
data: {{path: {data}, max_length: 48}}
train: {{global_batch: 16}}
strategy: {{type: ddp}}
hardware: 4xA800-80GB
"""


def rehearse(launch: Launcher, recipe: str | Path, run: Path) -> str:
    done = launch(recipe, "--rehearse", "--run-dir", run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearsed    data ✓   model ✓   step ✓   checkpoint ✓   resume ✓   export ✓" in done.stdout
    plan = read_json(RunDir(run).plan)
    assert isinstance(plan, dict)
    assert {path.name for path in RunDir(run).heartbeats.glob("[0-9]*.json")} == {
        f"{rank}.json" for rank in range(plan["num_processes"])
    }
    newest, skipped = manifest.newest_valid(RunDir(run))
    assert newest is not None
    assert not skipped
    assert f"step-{plan['recipe']['train']['max_steps']}" == newest.folder.name
    assert list(RunDir(run).export.glob("*.safetensors"))
    return done.stdout


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_runs_here(launch: Launcher, name: str, tmp_path: Path) -> None:
    if "zero" in name and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the extra deepspeed")
    rehearse(launch, name, tmp_path / "run")


def test_code_of_the_model_is_rehearsed_where_it_is_here(launch: Launcher, data_file: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tokenizer_in_config=True)
    for weights in model.glob("*.safetensors"):  # a rehearsal needs none
        weights.unlink()
    recipe = tmp_path / "remote.yaml"
    recipe.write_text(REMOTE.format(model=model, data=data_file))
    told = rehearse(launch, recipe, tmp_path / "run")
    assert "differs" not in told
    assert list((tmp_path / "run" / "code").glob("*/modeling_tiny.py"))


def test_it_is_no_dry_run(launch: Launcher) -> None:
    done = launch("quickstart", "--rehearse", "--dry-run")
    assert done.returncode == 2
    assert (
        "error: --rehearse --dry-run: one tries everything before your eyes, the other starts nothing\n  leave one out"
        in done.stderr
    )
