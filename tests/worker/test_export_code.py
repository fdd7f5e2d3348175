"""A folder that was exported with the model's own code: it stands alone, names no other repository, and answers the same."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.remotecode import find_code, read_code, stage
from launcher.worker.export import _logits, _probe_ids, _verify_in_fresh_process, _write
from launcher.worker.loading import Trained
from launcher.worker.prepared import DataReport, Prepared
from launcher.worker.staged import load_tokenizer, load_weights
from tests.worker.conftest import Job
from tests.worker.remote_models import write_model

# PEFT asks the model by a name that transformers will drop.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

RECIPE = """
model: {{path: {model}, trust_remote_code: true}}
data: {{path: {data}}}
adapter: {{type: {adapter}}}
hardware: 1xcpu
"""
QUESTION = "Add 2 and 3"
# What somebody would type who has never heard of launch.
PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.tensor([tokenizer(sys.argv[2])["input_ids"]])
made = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
print(json.dumps({"ids": made[0].tolist(), "class": type(model).__name__, "tokenizer": type(tokenizer).__name__}))
"""


def edited(file: Path, **values: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def for_transformers(folder: Path) -> Path:
    """The model without `from . import x`, which transformers itself does not follow."""
    modeling = (folder / "modeling_tiny.py").read_text()
    modeling = modeling.replace("from . import layers_tiny", "from .layers_tiny import Block")
    (folder / "modeling_tiny.py").write_text(modeling.replace("layers_tiny.Block", "Block"))
    return folder


def in_sub_folders(folder: Path) -> Path:
    """The layers in a folder of their own, which goes back up for the config."""
    (folder / "parts").mkdir()
    (folder / "parts" / "__init__.py").write_text("")
    layers = (folder / "layers_tiny.py").read_text()
    (folder / "parts" / "layers.py").write_text("from ..configuration_tiny import MARK\n" + layers)
    (folder / "layers_tiny.py").unlink()
    modeling = (folder / "modeling_tiny.py").read_text()
    modeling = modeling.replace("from . import layers_tiny", "from .parts.layers import Block")
    (folder / "modeling_tiny.py").write_text(modeling.replace("layers_tiny.Block", "Block"))
    return folder


def trained(model: Path, job: Job, adapter: str) -> Trained:
    """A model as it is after a run: its weights moved away from those of the folder, or an adapter over them."""
    job.recipe = job.folder.parent / "recipe.yaml"
    rows = job.folder.parent / "rows.json"
    rows.write_text("[]")
    job.recipe.write_text(RECIPE.format(model=model, data=rows, adapter=adapter))
    plan = job.plan()
    code = find_code(model)
    assert code is not None
    staged = stage(code, read_code(model, code), job.folder / "code")
    loaded, tokenizer = load_weights(model, staged), load_tokenizer(model, staged)
    torch.manual_seed(0)
    if adapter != "full":
        import peft

        settings = peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False)
        loaded = peft.get_peft_model(loaded, settings)
    else:
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter += torch.randn_like(parameter) * 0.1
    report = DataReport(**dict.fromkeys(DataReport.model_fields, 0))
    prepared = Prepared(
        model_dir=str(model), tokenizer_dir=str(model), data_dir="", template="plain", pad_token_id=0,
        eos_token_ids=(1,), rows_key="", report=report, code=staged,
    )  # fmt: skip
    return Trained(plan, prepared, loaded.eval(), tokenizer, job.folder)


def exported(what: Trained, out: Path) -> list[int]:
    """Write the folder; the tokens that the trained model itself answers with."""
    ids = torch.tensor([what.tokenizer(QUESTION)["input_ids"]])
    with torch.no_grad():
        made = what.model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=[1], pad_token_id=0)
    out.mkdir()
    _write(what, out, "2GB")
    answer: list[int] = made[0].tolist()
    return answer


def plainly(folder: Path, modules: Path) -> dict[str, Any]:
    """The answer of transformers alone, in a fresh process, offline, with an empty module cache."""
    modules.mkdir()
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}
    command = [sys.executable, "-c", PLAIN, str(folder), QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_transformers_alone_answers_the_same(adapter: str, job: Job, tmp_path: Path) -> None:
    model = for_transformers(write_model(tmp_path / "model"))
    if adapter == "full":
        # As a folder looks that was fine-tuned from a hub id before: code of a repository, the tokenizer's as a bare list.
        classes = {"AutoConfig": "org/name--configuration_tiny.TinyConfig",
                   "AutoModelForCausalLM": "org/name--modeling_tiny.TinyForCausalLM"}  # fmt: skip
        edited(model / "config.json", auto_map=classes)
        edited(model / "tokenizer_config.json", auto_map=["org/name--tokenization_tiny.TinyTokenizer", None])
    what = trained(model, job, adapter)
    out = tmp_path / "out"
    expected = exported(what, out)
    code, before = find_code(out), find_code(model)
    assert code is not None
    assert before is not None
    assert code == before, "the same classes, the same bytes"
    assert {path.name for path in out.rglob("*.py")} == {file.name for file in before.files}
    for name in ("config.json", "tokenizer_config.json"):
        assert "--" not in json.dumps(json.loads((out / name).read_text())["auto_map"])
    shutil.rmtree(model)
    shutil.rmtree(job.folder / "code", ignore_errors=True)
    answer = plainly(out, tmp_path / "modules")
    assert answer == {"ids": expected, "class": "TinyForCausalLM", "tokenizer": "TinyTokenizer"}


def test_code_in_folders_goes_along_and_launch_loads_it(job: Job, tmp_path: Path) -> None:
    model = in_sub_folders(write_model(tmp_path / "model", tokenizer_in_config=True))
    what = trained(model, job, "lora")
    out = tmp_path / "out"
    expected = exported(what, out)
    code, before = find_code(out), find_code(model)
    assert code is not None
    assert code == before
    assert stat.S_IMODE((out / "parts").stat().st_mode) & stat.S_IXUSR
    staged = stage(code, read_code(out, code), tmp_path / "again")
    ids = torch.tensor([load_tokenizer(out, staged)(QUESTION)["input_ids"]])
    made = load_weights(out, staged).generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    assert made[0].tolist() == expected


def test_the_fresh_process_says_that_transformers_alone_loads_it(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = trained(for_transformers(write_model(tmp_path / "model")), job, "full")
    torch.save(_logits(what.model, _probe_ids(what)), tmp_path / "probe.pt")
    exported(what, tmp_path / "out")
    assert type(what.model).is_remote_code(), "known as the model's own afterwards too"
    assert type(what.model.config).is_remote_code()
    _verify_in_fresh_process(tmp_path / "out", tmp_path / "probe.pt", what)
    assert "gives the same logits too" in capsys.readouterr().out
