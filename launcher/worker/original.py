"""The way back: a converted model that was trained in, a folder in its original layout out, for whoever serves its own code.

Keys are the original's (query, key and value in one matrix again), config.json, tokenizer and .py files are copies of the
source's. The code is copied, never run: the folder is tried by converting it once more.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UsageError
from launcher.modelshape.files import config_of_folder
from launcher.native import NativeConfig, native_config
from launcher.plan import Plan
from launcher.rundir import RunDir
from launcher.worker.convert import KEYS, Row, convert_model, filled, wanted_config
from launcher.worker.fused_adapter import write_fused
from launcher.worker.loading import Trained
from launcher.worker.native_tokenizer import convert_tokenizer
from launcher.worker.prepared import read_prepared

WAY_BACK = ("chatglm2", "chatglm3")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def require_way_back(run: RunDir) -> None:
    """Say what cannot be written in an original layout, before anything is loaded.

    Raises:
        UsageError: the run's model was not converted, is of another family, or its folder is no longer there.
    """
    native = Plan.model_validate_json(run.plan.read_text(encoding="utf-8")).shape.native
    found = source = None
    if native is not None:
        source = read_prepared(run).source_dir
    if native is None:
        found = "the model of this run was not converted, its layout is the original one"
    elif native.source not in WAY_BACK:
        found = f"this version knows the way back for {' and '.join(WAY_BACK)}, not for {native.source}"
    elif source is None or not Path(source).is_dir():
        found = f"its config, tokenizer and code are copied from {source}, which is no longer there"
    if found is not None:
        raise UsageError("--layout original", found, f"export it as it was trained: launch export {run.path}")


def write_original(trained: Trained, folder: Path, max_shard_size: str) -> int:
    """Merged weights under their original keys, and everything else as in the source; the bytes written."""
    from huggingface_hub import save_torch_state_dict

    assert trained.prepared.source_dir is not None
    source = Path(trained.prepared.source_dir)
    found = wanted_config(source, trained.plan.shape.name)
    state = original_layout(merged(trained).state_dict(), found)
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, folder / file.name)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_torch_state_dict(state, folder, max_shard_size=max_shard_size)
    if write_fused(trained.checkpoint, found, folder / "adapter"):
        print("adapter      beside the merged weights, for the original ones: adapter/")
    return shared_and_counted(folder)


def original_layout(state: Mapping[str, torch.Tensor], found: NativeConfig) -> dict[str, torch.Tensor]:
    """Tensors of the native class -> those of the original layout.

    Raises:
        ValueError: a tensor has no place there.
    """
    left = dict(state)
    made: dict[str, torch.Tensor] = {}
    for row in KEYS[found.native.source]:
        if not row.targets:
            continue
        first = Row(row.targets[0], ())
        for parts in [first.match(key) for key in left]:
            if parts is not None:
                made[filled(row.source, parts)] = torch.cat([left.pop(filled(name, parts)) for name in row.targets])
    if left:
        raise ValueError(f"no place in the layout of {found.native.source} for {', '.join(sorted(left)[:4])}")
    if found.native.source in WAY_BACK:
        # Its code uses only dtype and device of it, and complains where it is not there.
        size = found.config["head_dim"] // 2
        dtype = next(iter(made.values())).dtype
        made["transformer.rotary_pos_emb.inv_freq"] = (1 / 10000 ** (torch.arange(0, size, 2) / size)).to(dtype)
    return made


def merged(trained: Trained) -> Any:
    """The model with its adapter in its weights."""
    return trained.model.merge_and_unload() if trained.plan.recipe.adapter.type != "full" else trained.model


def shared_and_counted(folder: Path) -> int:
    """Gives all files the permissions that the person's new files have; the bytes of the weights."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):  # the model's own code may lie in folders, which a file's permissions would close
        if path.is_file():
            path.chmod(0o666 & ~umask)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def is_original(folder: Path) -> bool:
    """Whether a folder is one that would be converted."""
    return isinstance(native_config(config_of_folder(folder, folder.name)), NativeConfig)


@contextmanager
def converted_again(folder: Path) -> Iterator[Path]:
    """The folder converted into a temporary one beside it."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converted-") as into:
        found = convert_model(folder, Path(into), folder.name, lambda done, total: None)
        convert_tokenizer(folder, Path(into), found.native, folder.name)
        yield Path(into)
