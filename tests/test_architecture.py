"""What the design promises about the tree: the order of imports, a torch-free control side, files that stay readable."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import launcher

PACKAGE = Path(launcher.__file__).parent
ORDER = re.findall(r"^    (\w+)/? {2,}\S", launcher.__doc__ or "", flags=re.MULTILINE)
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "safetensors", "numpy")


def modules() -> Iterator[tuple[str, Path]]:
    """(name in the order, file) of every module; a package counts under its name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts not in (("__init__",), ("__main__",)):
            yield parts[0], path


def imports(path: Path) -> Iterator[str]:
    """Every module named by an import statement, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_docstring_of_the_package_lists_every_module() -> None:
    assert set(ORDER) == {name for name, _ in modules()}


def test_a_module_imports_only_from_those_above_it() -> None:
    wrong = []
    for name, path in modules():
        for imported in imports(path):
            other = imported.split(".")[1] if imported.startswith("launcher.") else ""
            if other in ORDER and other != name and ORDER.index(other) >= ORDER.index(name):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert not wrong


def test_the_control_side_names_no_heavy_library() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {imported}"
        for name, path in modules()
        if name != "worker"
        for imported in imports(path)
        if imported.split(".")[0] in HEAVY
    ]
    assert not wrong


def test_planning_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from launcher.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print([m for m in %r if m in sys.modules])"
    )
    recipe = PACKAGE.parent / "recipes" / "alpaca_lora_8xa800.yaml"
    done = subprocess.run(
        [sys.executable, "-c", code % (HEAVY,), "plan", str(recipe)], capture_output=True, text=True, check=True
    )
    assert "chatglm" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_files_functions_and_arguments_stay_small() -> None:
    wrong = []
    for _, path in modules():
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            wrong.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 60:
                    wrong.append(f"{path.name}: {node.name} has {length} lines")
                if len(node.args.args) + len(node.args.kwonlyargs) > 7:
                    wrong.append(f"{path.name}: {node.name} has too many parameters")
    assert not wrong


def test_every_public_name_of_the_control_side_is_described() -> None:
    wrong = []
    for _, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if ast.get_docstring(tree) is None:
            wrong.append(f"{path.relative_to(PACKAGE)} opens without saying what comes in and goes out")
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and ast.get_docstring(node) is None
            ):
                wrong.append(f"{path.relative_to(PACKAGE)}: {node.name}")
    assert not wrong
