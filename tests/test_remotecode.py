"""What launcher/remotecode finds in a model folder, refuses, remarks on, pins and stages; nothing of it is executed here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from launcher.errors import PreflightError, RecipeError
from launcher.recipe.schema import Model
from launcher.remotecode import Staged, find_code, planned_code, read_code, stage, staging, trust_code
from launcher.remotecode.finding import cycle_in
from launcher.remotecode.review import remarks
from tests.worker.remote_models import write_model

FILES = ["configuration_tiny.py", "layers_tiny.py", "modeling_tiny.py", "text_tiny.py", "tokenization_tiny.py"]


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", weights=False)


def names(folder: Path) -> list[str]:
    code = find_code(folder)
    return [file.name for file in code.files] if code else []


def refused(folder: Path, trust: bool = True) -> PreflightError:
    with pytest.raises(PreflightError) as caught:
        planned_code(Model(path=str(folder), trust_remote_code=trust), Path("/"), folder.parent / "my.yaml")
    assert caught.value.exit_code == 4
    assert caught.value.to_type
    return caught.value


@pytest.mark.parametrize("tokenizer_in_config", [False, True])
def test_every_file_that_is_reached_is_found(tmp_path: Path, tokenizer_in_config: bool) -> None:
    folder = write_model(tmp_path / "model", tokenizer_in_config=tokenizer_in_config, weights=False)
    (folder / "unrelated.py").write_text("import antigravity")
    assert names(folder) == FILES
    code = find_code(folder)
    assert code is not None
    assert code.classes["AutoTokenizer"] == "tokenization_tiny.TinyTokenizer"


def test_imports_in_functions_and_of_subfolders_are_followed(folder: Path) -> None:
    (folder / "parts" / "deep").mkdir(parents=True)
    (folder / "parts" / "__init__.py").write_text("")
    (folder / "parts" / "deep" / "one.py").write_text("from ..two import three\n")
    (folder / "parts" / "two.py").write_text("three = 3\n")
    (folder / "text_tiny.py").write_text(
        "def pieces(text):\n    from .parts.deep.one import three\n    return list(text)\n"
    )
    assert set(names(folder)) - set(FILES) == {"parts/__init__.py", "parts/deep/one.py", "parts/two.py"}


def test_an_optional_file_may_be_missing(folder: Path) -> None:
    (folder / "text_tiny.py").write_text(
        "try:\n    from .kernels import fast\nexcept ImportError:\n    fast = None\npieces = list\n"
    )
    assert names(folder) == FILES


def test_a_repository_before_the_class_is_dropped_where_the_folder_has_the_file(folder: Path) -> None:
    set_map(folder, AutoModelForCausalLM="somebody/tiny--modeling_tiny.TinyForCausalLM")
    assert names(folder) == FILES
    set_map(folder, AutoModelForCausalLM="somebody/tiny--modeling_other.Other")
    assert (
        "names code of another repository, somebody/tiny, and the folder has no modeling_other.py"
        in refused(folder).found
    )


def set_map(folder: Path, **classes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"].update(classes)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_snapshot_of_the_hub_is_made_of_links_into_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    write_model(snapshot, weights=False)
    blobs.mkdir()
    for name in FILES:
        (snapshot / name).rename(blobs / f"blob-{name}")
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    assert names(snapshot) == FILES


BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing class": (
        lambda folder: set_map(folder, AutoModelForCausalLM="modeling_tiny.TinyFor"),
        "auto_map names modeling_tiny.TinyFor, but modeling_tiny.py has no TinyFor",
        "copy the config and the .py files from the same revision",
    ),
    "missing file": (
        lambda folder: (folder / "modeling_tiny.py").unlink(),
        "there is no modeling_tiny.py: the folder has only configuration_tiny.py, layers_tiny.py",
        "copy the .py files of the original model there",
    ),
    "missing import": (
        lambda folder: (folder / "layers_tiny.py").unlink(),
        "there is no layers_tiny.py, and modeling_tiny.py:6 imports it",
        "copy the .py files of the original model there",
    ),
    "weights but no code": (
        lambda folder: [path.unlink() for path in folder.glob("*.py")],
        "the folder has weights but no .py file at all",
        "copy the .py files of the original model there",
    ),
    "syntax error": (
        lambda folder: (folder / "text_tiny.py").write_text("def pieces(text):\nreturn text\n"),
        "text_tiny.py:2 is no Python: expected an indented block",
        "mend text_tiny.py, or copy it again",
    ),
    "null bytes": (
        lambda folder: (folder / "text_tiny.py").write_bytes(b"pieces = 1\0"),
        "text_tiny.py is no Python: source code string cannot contain null bytes",
        "mend text_tiny.py, or copy it again",
    ),
    "third-party import": (
        lambda folder: (folder / "text_tiny.py").write_text("import os\nimport icetk_is_gone\n"),
        "text_tiny.py:2 imports icetk_is_gone, which is not installed",
        "pip install icetk_is_gone",
    ),
    "link out of the folder": (
        lambda folder: (
            (folder / "text_tiny.py").rename(folder.parent / "x.py") and (folder / "text_tiny.py").symlink_to("../x.py")
        ),
        "text_tiny.py is a link to",
        "put the file itself there: cp --remove-destination",
    ),
    "import out of the folder": (
        lambda folder: (folder / "text_tiny.py").write_text("from ..other import pieces\n"),
        "text_tiny.py:1 imports from outside of the folder",
        "put all of the code into one folder",
    ),
    "a module missing from its package": (
        lambda folder: (
            (folder / "parts").mkdir(),
            (folder / "parts" / "__init__.py").write_text(""),
            (folder / "text_tiny.py").write_text("from .parts.blocks import pieces\n"),
        ),
        "there is no parts/blocks.py, and text_tiny.py:1 imports it",
        "copy the .py files of the original model there",
    ),
    "an import without its dot": (
        lambda folder: (folder / "text_tiny.py").write_text("import layers_tiny\n"),
        "text_tiny.py:1 imports layers_tiny as if it were installed; it lies beside it",
        "write in text_tiny.py: from .layers_tiny import",
    ),
    "nested without end": (
        lambda folder: (folder / "text_tiny.py").write_text("x = a" + ".b" * 100_000),
        "text_tiny.py is no Python: it is nested too deeply to be looked at",
        "mend text_tiny.py, or copy it again",
    ),
    "a link to itself": (
        lambda folder: ((folder / "text_tiny.py").unlink(), (folder / "text_tiny.py").symlink_to("text_tiny.py")),
        "text_tiny.py is a link to itself",
        "copy the file again",
    ),
    "a pipe": (
        lambda folder: ((folder / "text_tiny.py").unlink(), os.mkfifo(folder / "text_tiny.py")),
        "text_tiny.py is no file",
        "put the file itself there",
    ),
    "no class": (
        lambda folder: set_map(folder, AutoModelForCausalLM="modeling_tiny"),
        "names 'modeling_tiny', which is no file.Class",
        "mend config.json",
    ),
    "a path instead of a name": (
        lambda folder: set_map(folder, AutoModelForCausalLM="../x.Y"),
        "names '../x.Y', which is no file.Class",
        "mend config.json",
    ),
    "no map": (
        lambda folder: set_map(folder, AutoConfig=7),
        "the auto_map of config.json cannot be read",
        "write config.json again",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_starts(folder: Path, case: str) -> None:
    spoil, found, to_type = BAD[case]
    spoil(folder)
    error = refused(folder)
    assert found in error.found
    assert to_type in error.to_type


def test_a_circle_of_imports_is_found_and_one_inside_of_a_function_is_none() -> None:
    assert cycle_in({"a.py": b"from .b import x", "b.py": b"from . import c", "c.py": b"from .a import y"}) == [
        "a.py",
        "b.py",
        "c.py",
        "a.py",
    ]
    assert cycle_in({"a.py": b"from .b import x", "b.py": b"def f():\n    from .a import y"}) == []


def test_code_that_is_needed_and_not_allowed_is_a_mistake_of_the_recipe(folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        planned_code(Model(path=str(folder)), Path("/"), Path("my.yaml"), needed=True)
    assert caught.value.exit_code == 2
    assert "launch trust my.yaml. If you trust it: model.trust_remote_code=true" in caught.value.problems[0].message


SUSPICIOUS = """\
import subprocess as sp, ctypes, pickle
from os import system
import torch, os, requests
from urllib.request import urlopen
exec("x"); eval("y"); compile("z", "", "exec"); __import__("m")
sp.run(["ls"]); system("ls"); os.execv("a", [])
requests.get("u"); urlopen("u")
open("f", "w"); open("f"); open("f", mode="ab"); path.write_text("t")
torch.load("w"); torch.load("w", weights_only=True); torch.load("w", weights_only=False)
getattr(os, name)
model.eval(); re.compile("x"); torch.compile(f); line.open("r")
"""


def test_what_deserves_a_look_is_named_with_its_line() -> None:
    found = [(remark.line, remark.what) for remark in remarks({"m.py": SUSPICIOUS.encode()})]
    assert {what for line, what in found if line == 5} == {"exec()", "eval()", "compile()", "__import__()"}
    assert {what for line, what in found if line == 6} == {"subprocess.run()", "os.system()", "os.execv()"}
    assert {what for line, what in found if line == 7} == {"requests.get()", "urllib.request.urlopen()"}
    assert {what for line, what in found if line == 8} == {"open(…, 'w')", "open(…, 'ab')", ".write_text()"}
    assert [what for line, what in found if line == 9] == ["torch.load()"]
    assert (10, "getattr()") in found
    assert not [what for line, what in found if line == 11]
    assert {what for line, what in found if line == 1} == {"import subprocess", "import ctypes", "import pickle"}


def test_changed_code_is_refused_with_a_diff_until_it_is_trusted_again(folder: Path, tmp_path: Path) -> None:
    recipe, model = tmp_path / "my.yaml", Model(path=str(folder), trust_remote_code=True)
    _, code = planned_code(model, Path("/"), recipe)
    assert code is not None
    assert not code.pinned_by
    trusted = trust_code(model, Path("/"), recipe)
    assert trusted.lock == tmp_path / "my.lock.json"
    pinned, code = planned_code(model, Path("/"), recipe)
    assert code is not None
    assert (code.pinned_by, pinned.code_sha256) == ("my.lock.json", code.sha256)
    (folder / "text_tiny.py").write_text("def pieces(text):\n    return text.split()\n")
    error = refused(folder)
    assert "my.lock.json" in error.you_set
    for line in (
        "--- trusted/text_tiny.py",
        "+++ now/text_tiny.py",
        "-    return list(text)",
        "+    return text.split()",
    ):
        assert f"\n    {line}" in error.found
    assert error.to_type == f"read what changed; if you trust it: launch trust {recipe}"
    (tmp_path / "my.trusted" / "text_tiny.py").write_text("lost")
    assert "text_tiny.py (its old text is no longer in my.trusted)" in refused(folder).found
    trust_code(model, Path("/"), recipe)
    planned_code(model, Path("/"), recipe)


def test_a_digest_in_the_recipe_counts_before_the_lock(folder: Path, tmp_path: Path) -> None:
    recipe, model = tmp_path / "my.yaml", Model(path=str(folder), trust_remote_code=True, code_sha256="0" * 64)
    trust_code(model, Path("/"), recipe)
    with pytest.raises(PreflightError, match=r"model.code_sha256: 000000000000…"):
        planned_code(model, Path("/"), recipe)


def test_a_digest_alone_shows_the_diff_too_once_its_text_was_seen(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    code = find_code(folder)
    assert code is not None
    model = Model(path=str(folder), trust_remote_code=True, code_sha256=code.sha256)
    planned_code(model, Path("/"), recipe)
    (folder / "text_tiny.py").write_text("def pieces(text):\n    return text.split()\n")
    with pytest.raises(PreflightError) as caught:
        planned_code(model, Path("/"), recipe)
    assert "\n    +    return text.split()" in caught.value.found
    never_seen = model.model_copy(update={"code_sha256": "0" * 64})
    with pytest.raises(PreflightError, match="no copy of the trusted text is here"):
        planned_code(never_seen, Path("/"), recipe)


def test_a_pin_covers_which_classes_are_used(folder: Path, tmp_path: Path) -> None:
    with (folder / "modeling_tiny.py").open("a") as file:
        file.write("\n\nclass Other(TinyForCausalLM):\n    pass\n")
    trust_code(Model(path=str(folder), trust_remote_code=True), Path("/"), tmp_path / "my.yaml")
    set_map(folder, AutoModelForCausalLM="modeling_tiny.Other")
    error = refused(folder)
    assert "auto_map names other classes than when it was trusted" in error.found
    assert "modeling_tiny.Other" in error.found


def test_a_lock_that_cannot_be_read_says_how_to_get_rid_of_it(folder: Path, tmp_path: Path) -> None:
    lock = tmp_path / "my.lock.json"
    lock.write_text("{")
    assert f"rm -r {lock}" in refused(folder).to_type
    lock.unlink()
    lock.mkdir()
    assert "cannot be read" in refused(folder).found


def test_why_a_model_is_not_converted_is_said_where_its_code_would_be_needed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="its config has frobnicate"):
        planned_code(
            Model(path=str(folder)),
            Path("/"),
            tmp_path / "my.yaml",
            True,
            ["its config has frobnicate, which is unknown"],
        )


def test_the_lock_pins_code_that_is_yet_to_be_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = tmp_path / "my.yaml"
    pin = trust_code(Model(path=str(folder), trust_remote_code=True), Path("/"), recipe).code.sha256
    pinned, code = planned_code(Model(path="a/b", trust_remote_code=True), Path("/"), recipe)
    assert (pinned.code_sha256, code) == (pin, None)


def staged(folder: Path, root: Path) -> Staged:
    code = find_code(folder)
    assert code is not None
    return stage(code, read_code(folder, code), root)


def test_a_staged_folder_is_complete_compiled_and_read_only(folder: Path, tmp_path: Path) -> None:
    result = staged(folder, tmp_path / "code")
    compiled = {f"__pycache__/{name[:-3]}.{sys.implementation.cache_tag}.pyc" for name in FILES}
    assert set(result.table) == {*FILES, *compiled}
    assert not any(path.stat().st_mode & 0o222 for path in [Path(result.folder), *Path(result.folder).rglob("*")])
    assert staged(folder, tmp_path / "code") == result
    (Path(result.folder) / "text_tiny.py").chmod(0o644)
    (Path(result.folder) / "text_tiny.py").write_text("changed")
    with pytest.raises(PreflightError, match=r"text_tiny.py is not what the plan names"):
        staged(folder, tmp_path / "code")


def _stage_and_die(folder: Path, root: Path, after: int) -> None:
    """Killed when so many files are written."""
    compile_one = staging.py_compile.compile

    def compile_or_die(*arguments: object, **options: object) -> object:
        nonlocal after
        after -= 1
        if after == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return compile_one(*arguments, **options)

    staging.py_compile.compile = compile_or_die
    staged(folder, root)


def test_a_preparation_that_is_killed_leaves_nothing_that_counts(folder: Path, tmp_path: Path) -> None:
    for after in (1, 3, 5):
        process = get_context("fork").Process(target=_stage_and_die, args=(folder, tmp_path / "code", after))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not [path for path in (tmp_path / "code").iterdir() if not path.name.startswith(".")]
    assert len(staged(folder, tmp_path / "code").table) == 10


def test_source_that_changes_after_planning_is_not_staged(folder: Path, tmp_path: Path) -> None:
    code = find_code(folder)
    assert code is not None
    (folder / "text_tiny.py").write_text("pieces = list\n")
    with pytest.raises(PreflightError, match=r"text_tiny.py has changed since this run was planned"):
        read_code(folder, code)


def test_launch_trust_and_plan_show_the_files(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text(
        f"model: {{path: {folder}, trust_remote_code: true}}\ndata: {{path: rows.json}}\nhardware: 2xcpu\n"
    )
    (folder / "text_tiny.py").write_text("import os\ndef pieces(text):\n    os.system('true')\n    return list(text)\n")
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "trust", "my.yaml"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "text_tiny.py:3  os.system(): starts a program" in done.stdout
    assert "wrote my.lock.json" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "plan", "my.yaml"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    code = find_code(folder)
    assert code is not None
    assert "pinned by my.lock.json" in done.stdout
    assert all(f"{file.sha256}  {file.name}" in done.stdout for file in code.files)
