"""Every shipped recipe: planned without network, torch or a GPU; its plan as golden text; its head comment kept honest."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launcher import preflight
from launcher.cluster import GIB, resolve_cluster
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import load_recipe, purpose
from launcher.recipe.describe import schema_text
from launcher.show import show_plan
from launcher.worker.data.rows import read_conversations

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SCHEMA_LINE = "# yaml-language-server: $schema=schema.json"

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])


@pytest.fixture(autouse=True)
def _a_bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host of 16 GiB whose hub cache is empty, and a working folder that is no part of the repository."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setattr("launcher.cluster.machine.host_memory_bytes", lambda: 16 * GIB)
    monkeypatch.setattr("launcher.cluster.machine.usable_cores", lambda: 2)
    monkeypatch.chdir(tmp_path)


def plan_of(path: Path, *overrides: str) -> Plan:
    """The plan of a recipe; one for whatever is here is planned for two CPU ranks."""
    loaded = load_recipe(path, overrides)
    if loaded.recipe.hardware == "auto":
        loaded = load_recipe(path, ("hardware=2xcpu", *overrides))
    cluster = resolve_cluster(loaded.recipe.hardware)
    return make_plan(loaded.name, loaded.recipe, cluster, shape_of(loaded.recipe.model, FOLDER))


def head(path: Path) -> str:
    """The comment that a recipe begins with, without the schema line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(place for place, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[1:end])


def test_all_recipes_are_found() -> None:
    """So that no test below passes because it looked at nothing."""
    assert [path.stem for path in RECIPES] == [
        "alpaca_lora_1gpu_int8",
        "alpaca_lora_8xa800",
        "alpaca_qlora_1x12gb",
        "chatglm2_adalora_one_sample",
        "chatglm2_lora_2gpu_mixed",
        "full_fsdp_8xa800",
        "full_zero3_8xa800",
        "quickstart",
    ]


@each_recipe
def test_the_plan_is_the_golden_text(path: Path, golden: Callable[[str, str], None]) -> None:
    text = io.StringIO()
    screen = Console(file=text, width=160, soft_wrap=True, highlight=False, color_system=None, legacy_windows=False)
    show_plan(screen, plan_of(path))
    lines = [line.rstrip() for line in text.getvalue().replace(str(ROOT), "<repo>").splitlines()]
    golden(path.stem, "\n".join(lines) + "\n")


@each_recipe
def test_the_plan_reads_back_as_it_was_written(path: Path) -> None:
    plan = plan_of(path)
    assert Plan.model_validate_json(plan.model_dump_json(by_alias=True)) == plan


@each_recipe
def test_the_head_comment_says_what_and_how(path: Path) -> None:
    comment = head(path)
    assert path.read_text(encoding="utf-8").splitlines()[0] == SCHEMA_LINE
    assert re.search(rf"launch (recipes/)?{path.stem}\b", comment), "the command that runs it"
    sentence = purpose(path)
    assert sentence
    assert f"{sentence}." in comment.replace("\n# ", " ")
    assert len(sentence) < 100, "a line of `launch recipes`"


@each_recipe
def test_the_head_comment_names_the_data_that_has_to_be_brought(path: Path) -> None:
    data = plan_of(path).recipe.data
    assert isinstance(data.path, str)
    file = Path(data.path)
    assert file.is_relative_to(FOLDER / "data")
    if file.is_file():
        conversations, bad = read_conversations(data, data.path)
        assert conversations
        assert not bad
    else:
        assert f"recipes/data/{file.name}" in head(path)
        assert "data.path=FILE" in head(path)


@each_recipe
def test_other_hardware_of_the_head_comment_plans_too(path: Path) -> None:
    for hardware in re.findall(r'hardware="([^"]+)"', head(path)):
        plan = plan_of(path, f"hardware={hardware}")
        assert plan.global_batch == plan_of(path).global_batch


@each_recipe
def test_the_head_comment_says_what_is_only_planned(path: Path, tmp_path: Path) -> None:
    plan = plan_of(path)
    refused = any(
        finding.level == "error" and finding.what.startswith("strategy.") for finding in preflight.check(plan, tmp_path)
    )
    assert (f"runs it naively, and only plans it {plan.schedule}" in head(path)) == refused


@each_recipe
def test_the_packages_that_it_needs_are_named(path: Path) -> None:
    plan = plan_of(path)
    needs = plan.recipe.model.quantization != "none" or plan.recipe.train.optimizer != "adamw"
    assert ("launch-trainer[bitsandbytes]" in head(path)) == needs
    assert ("launch-trainer[deepspeed]" in head(path)) == plan.strategy.startswith("zero")


def test_the_editors_schema_is_that_of_the_recipe() -> None:
    assert (FOLDER / "schema.json").read_text(encoding="utf-8") == schema_text(), "type: launch schema"


def test_one_sample_is_one_fact_asked_in_eight_ways() -> None:
    rows = json.loads((FOLDER / "data" / "one_sample.json").read_text(encoding="utf-8"))
    assert len({row["prompt"] for row in rows}) == len(rows) == 8
    assert len({row["response"] for row in rows}) == 1
    plan = plan_of(FOLDER / "chatglm2_adalora_one_sample.yaml")
    assert plan.micro_batch * plan.accumulation == len(rows), "an epoch is one optimizer step"
    assert plan.recipe.data.eval is not None
    assert plan.recipe.data.eval.path == plan.recipe.data.path


_OFFLINE = """
import json, sys
asked = []

def watch(event, arguments):
    if event.startswith("socket."):
        asked.append(event)
        raise OSError("there is no network in this test")

sys.addaudithook(watch)
from launcher.cli import main
code = None
try:
    main(["plan", sys.argv[1]])
except SystemExit as end:
    code = end.code
heavy = [name for name in ("torch", "transformers", "peft", "accelerate", "datasets", "numpy") if name in sys.modules]
print(json.dumps({"code": code, "heavy": heavy, "asked": asked}), file=sys.stderr)
"""


@each_recipe
def test_launch_plan_needs_neither_torch_nor_network(path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", _OFFLINE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr, done.stdout
    assert json.loads(done.stderr.splitlines()[-1]) == {"code": 0, "heavy": [], "asked": []}, done.stderr
    assert done.stdout.startswith(path.stem)
