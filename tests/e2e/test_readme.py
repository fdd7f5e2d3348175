"""What the README says is typed as it stands there, and what a run says to type next is typed as it was printed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from launcher.cli import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks() -> list[list[str]]:
    return [block.strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)]


def typed(line: str, folder: Path, text: str | None = None) -> str:
    done = subprocess.run(
        shlex.split(line), cwd=folder, capture_output=True, text=True, input=text, check=False, timeout=300
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, launch_cache: Path) -> tuple[Path, str, float]:
    """Where the README's first command was typed, what it printed and how long it took in seconds."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    started = time.monotonic()
    printed = typed(blocks()[0][1], folder)
    return folder, printed, time.monotonic() - started


def next_command(printed: str, label: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.strip().startswith(label)]
    return line.strip().removeprefix(label).strip()


def test_the_readme_is_short_and_its_blocks_are_install_run_and_test() -> None:
    assert README.count("\n") < 150
    assert blocks() == [["pip install -e .", "launch recipes/quickstart.yaml"], ["pip install -e '.[test]'", "pytest"]]


def test_every_verb_the_readme_names_exists() -> None:
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    words = set(re.findall(r"`launch (\w+)", README))
    unknown = {word for word in words if word not in cli.commands and word not in recipes | {"RECIPE", "my"}}
    assert not unknown
    assert recipes == set(re.findall(r"`(\w+)`", README.partition("| shipped recipe |")[2].partition("\n\n")[0]))


def test_every_link_of_the_docs_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_quickstart_learns_and_says_what_to_type_next(quickstart: tuple[Path, str, float]) -> None:
    folder, printed, _ = quickstart
    assert "\x1b[" not in printed, "no escape codes where the output is no terminal"
    for label in ("prepare", "start", "train", "done", "watch", "chat", "go on", "take away"):
        assert any(line.strip().startswith(label) for line in printed.splitlines()), label
    (report,) = [json.loads(path.read_text()) for path in folder.glob("runs/*/report.json")]
    assert report["result"] == "done"
    assert report["eval_last"] < report["eval_first"] / 3


def test_the_model_answers_from_the_data_afterwards(quickstart: tuple[Path, str, float]) -> None:
    folder, printed, _ = quickstart
    rows = json.loads((ROOT / "recipes" / "data" / "quickstart.json").read_text(encoding="utf-8"))
    asked = [row for row in rows if not row.get("input")]
    english = next(row for row in asked if row["instruction"].isascii())
    chinese = next(row for row in asked if not row["instruction"].isascii())
    chat = next_command(printed, "chat")
    right = 0
    for row in (english, chinese):
        right += typed(f"{chat} --prompt {shlex.quote(row['instruction'])}", folder).strip() == row["output"]
    talk = typed(chat, folder, text=f"{english['instruction']}\n\n")
    assert english["output"] in talk
    assert right == 2


def test_it_goes_on_and_is_taken_away(quickstart: tuple[Path, str, float]) -> None:
    folder, printed, _ = quickstart
    resumed = typed(next_command(printed, "go on") + " train.max_steps=150", folder)
    assert "complete, verified" in resumed
    exported = typed(next_command(printed, "take away"), folder)
    assert "same logits" in exported
    (out,) = folder.glob("runs/*/export")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert (out / "model.safetensors").stat().st_mode & 0o044, "colleagues can read it"
