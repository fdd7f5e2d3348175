"""The code of a model, imported from the folder that prepare staged: config, tokenizer and model of a rank, of chat and of export.

transformers' own way (`trust_remote_code=True`) copies the files of the model folder into a cache that all processes share, and runs
what it then finds there. It is not used: the staged folder is imported as a package of its own, and its classes are asked for
`from_pretrained` directly. Every byte that is executed was compared with the plan's checksum in the same read.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from launcher.compat import BUILT_FIRST
from launcher.errors import PreflightError
from launcher.plan import Plan
from launcher.remotecode import Staged
from launcher.worker.compat import mend
from launcher.worker.convert import read_shard, weight_files
from launcher.worker.pulse import first_line

# The first of them that the model's auto_map has; ChatGLM-6B has no AutoModelForCausalLM.
MODEL_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


class _Loader(SourceFileLoader):
    """Loads a staged module. A compiled file counts only where it was staged too and belongs to the source beside it."""

    def __init__(self, name: str, path: str, staged: Staged) -> None:
        super().__init__(name, path)
        self.staged = staged

    def get_data(self, path: str) -> bytes:
        if not Path(path).is_relative_to(self.staged.folder):  # PYTHONPYCACHEPREFIX
            raise FileNotFoundError(path)
        return self.staged.read(path)

    def set_data(self, path: str, data: bytes, *, _mode: int = 0o666) -> None:
        """Another Python than the one of prepare compiles for itself and leaves nothing."""


class _Finder:
    """Finds the modules of one staged folder, and nothing else."""

    def __init__(self, staged: Staged) -> None:
        self.staged = staged

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, *parts = name.split(".")
        if package != self.staged.package:
            return None
        base = Path(self.staged.folder, *parts)
        relative = "/".join(parts)
        inside = f"{relative}/__init__.py" if parts else "__init__.py"
        for file, is_package in ((inside, True), (f"{relative}.py", False)):
            if file in self.staged.table:
                path_of_file = Path(self.staged.folder, file)
                loader = _Loader(name, str(path_of_file), self.staged)
                spec = ModuleSpec(name, loader, origin=str(path_of_file), is_package=is_package)
                spec.has_location = True
                if is_package:
                    spec.submodule_search_locations = [str(base)]
                return spec
        if base.is_dir():  # a folder without __init__.py
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(base)]
            return spec
        return None


def check(plan: Plan, staged: Staged | None) -> None:
    """Compare what prepare staged with what the plan names; before anything is imported.

    Raises:
        PreflightError: they differ.
    """
    if plan.shape.native is not None:  # converted: none of it is executed
        return
    planned = plan.code.sha256 if plan.code is not None else plan.recipe.model.code_sha256
    if planned is not None and (staged is None or staged.code.sha256 != planned):
        found = "none was staged" if staged is None else f"what was staged has {staged.code.sha256[:12]}…"
        raise PreflightError(f"code with sha256 {planned[:12]}…", found, "prepare the run again: launch resume RUN")


def load_config(folder: str | Path, staged: Staged | None) -> Any:
    """The config of a model folder."""
    from transformers import AutoConfig

    config_class = _class(staged, "AutoConfig")
    if config_class is None:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config_class.register_for_auto_class()
    return config_class.from_pretrained(folder, local_files_only=True)


def load_tokenizer(folder: str | Path, staged: Staged | None) -> Any:
    """The tokenizer of a folder."""
    from transformers import AutoTokenizer

    tokenizer_class = _class(staged, "AutoTokenizer")
    if tokenizer_class is None:
        # Its own config class may be needed to find out what the tokenizer is.
        known = {"config": load_config(folder, staged)} if _has(staged, "AutoConfig") else {}
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **known)
    tokenizer_class.register_for_auto_class()
    return tokenizer_class.from_pretrained(folder, local_files_only=True)


def model_class(staged: Staged | None) -> Any:
    """The class that the model is made of; transformers' AutoModelForCausalLM where the model brings none."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    for auto in MODEL_CLASSES:
        found = _class(staged, auto)
        if found is not None:
            # By this transformers knows remote code: it then leaves its weight conversions off and keeps `generate`.
            found.register_for_auto_class(auto)
            return add_generation_mixin_to_remote_model(found)
    return AutoModelForCausalLM


def load_weights(folder: str | Path, staged: Staged | None, **options: Any) -> Any:
    """`from_pretrained` of the model, or what takes its place. Weights in a pickle are read as tensors only."""
    if staged is not None and BUILT_FIRST in staged.fixes:
        return _built(folder, staged, **options)
    known = {"config": load_config(folder, staged)} if staged is not None else {"trust_remote_code": False}
    return model_class(staged).from_pretrained(folder, local_files_only=True, weights_only=True, **known, **options)


def _built(
    folder: str | Path,
    staged: Staged,
    dtype: Any,
    device: Any = "cpu",
    output_loading_info: bool = False,
) -> Any:
    """The model as its code builds it, on a device, then filled: nothing that its __init__ computes is lost."""
    import torch
    from transformers import GenerationConfig

    config = load_config(folder, staged)
    with torch.device(device):
        model = model_class(staged)._from_config(
            config, dtype=(config.dtype or torch.float32) if dtype == "auto" else dtype
        )
    missing, unexpected = set(model.state_dict()), set()
    for file in weight_files(Path(folder), Path(folder).name):
        tensors = dict(read_shard(file))
        unexpected |= set(model.load_state_dict(tensors, strict=False).unexpected_keys)
        missing -= tensors.keys()
    missing -= set(getattr(model, "all_tied_weights_keys", None) or {})
    if Path(folder, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    left = {"missing_keys": missing, "unexpected_keys": unexpected}
    return (model.eval(), left) if output_loading_info else model.eval()


def from_config(config: Any, staged: Staged | None) -> Any:
    """The model of a config, with random weights in fp32."""
    import torch

    chosen = model_class(staged)
    build = chosen.from_config if chosen.__module__.startswith("transformers.models.auto") else chosen._from_config
    return build(config, dtype=torch.float32)


def try_out(staged: Staged, model_dir: Path, watched: Path) -> None:
    """Import everything that auto_map names and build the model without weights, so that what cannot work ends before a rank starts.

    Args:
        watched: a folder in which the code must not write.

    Raises:
        PreflightError: it cannot be loaded or built, or writes into the module cache.
    """
    import torch

    before = _tree(watched)
    try:
        for auto in staged.code.classes:
            _class(staged, auto)
        config = load_config(model_dir, staged)
        if any(_has(staged, auto) for auto in MODEL_CLASSES):
            with torch.device("meta"):
                from_config(config, staged)
        load_tokenizer(model_dir, staged)
    except PreflightError:
        raise
    except (Exception, SystemExit) as error:
        _refuse_writes(staged, model_dir, before, watched, error)
        raise _refused(staged, model_dir, error) from error
    _refuse_writes(staged, model_dir, before, watched, None)


def _has(staged: Staged | None, auto: str) -> bool:
    return staged is not None and auto in staged.code.classes


def _class(staged: Staged | None, auto: str) -> Any:
    """The class that auto_map names for an auto class, imported; None where it names none."""
    if staged is None or auto not in staged.code.classes:
        return None
    if not any(isinstance(finder, _Finder) and finder.staged == staged for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(staged))
    module, _, name = staged.code.classes[auto].rpartition(".")
    found = getattr(importlib.import_module(f"{staged.package}.{module}"), name)
    return mend(found, auto, staged.fixes, importlib.metadata.version("transformers"))


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Path -> (size, time of change) of everything in a folder."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def _refuse_writes(
    staged: Staged, model_dir: Path, before: dict[str, tuple[int, int]], watched: Path, error: BaseException | None
) -> None:
    """Raise where the module cache has changed, or something could not be written there."""
    after = _tree(watched)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    denied = getattr(error, "filename", None)
    if isinstance(error, PermissionError) and denied and Path(os.fsdecode(denied)).is_relative_to(watched):
        changed = changed or [os.path.relpath(os.fsdecode(denied), watched)]
    names = [name for name in changed if not any(other != name and other.startswith(f"{name}/") for other in changed)]
    if names:
        raise PreflightError(
            f"model.path: {model_dir}",
            f"its code writes into the module cache while it is loaded ({_place(staged, error)}{', '.join(names[:3])}): "
            "ranks that do so disturb each other",
            "take that out of the .py files, or ask who wrote them for a version without it",
        )


def _refused(staged: Staged, model_dir: Path, error: BaseException) -> PreflightError:
    """What stands against loading the code, with the line of it that failed."""
    from launcher.remotecode.finding import cycle_in

    what = f"{type(error).__name__}: {first_line(error)}"
    sources = {file.name: staged.read(Path(staged.folder, file.name)) for file in staged.code.files}
    cycle = cycle_in(sources) if isinstance(error, ImportError | AttributeError) and "partially" in str(error) else []
    if cycle:
        found = f"its files import one another in a circle: {' → '.join(cycle)} ({what})"
        return PreflightError(
            f"model.path: {model_dir}",
            found,
            f"move one of these imports into the function that needs it, in {cycle[-2]}",
        )
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing and not missing.startswith(staged.package):
        to_type = f"pip install {missing.partition('.')[0]}"
    else:
        to_type = "it may be written for another transformers: see what its model card asks for"
    return PreflightError(
        f"model.path: {model_dir}", f"its code cannot be loaded: {_place(staged, error)}{what}", to_type
    )


def _place(staged: Staged, error: BaseException | None) -> str:
    """`file:line: ` of the innermost frame that is the model's own code."""
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__) if error is not None else []
    own = [frame for frame in frames if frame.filename.startswith(staged.folder)]
    return f"{os.path.relpath(own[-1].filename, staged.folder)}:{own[-1].lineno}: " if own else ""
