"""Tiny recipes, and ranks that run them: see `rank_server.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher import manifest, supervise
from launcher.cluster import resolve_cluster
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import load_recipe
from launcher.recipe.device_maps import load_device_map
from launcher.remotecode import planned_code
from launcher.rundir import RunDir, read_events

RECIPE = """
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
           num_key_value_heads: 2, vocab_size: 320, max_position_embeddings: 128, tie_word_embeddings: false,
           attention_dropout: 0.1}}
data: {{path: {data}, max_length: 48, eval: {{rows: 6}}}}
adapter: {{type: lora, r: 4, alpha: 8, dropout: 0.1, targets: all-linear}}
train: {{max_steps: 8, lr: 5e-3, global_batch: 8, micro_batch: 2, log_every_steps: 1, eval_every_steps: 4}}
checkpoint: {{every_steps: 4, keep: 5}}
hardware: 2xcpu
"""


@dataclass
class Job:
    """A run directory whose ranks can be run, once or again from a checkpoint."""

    server: subprocess.Popen[str]
    recipe: Path
    folder: Path

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder)

    def plan(self, *overrides: str) -> Plan:
        loaded = load_recipe(self.recipe, overrides)
        named = loaded.recipe.strategy.device_map
        device_map = load_device_map(named).device_map if named is not None else None
        cluster = resolve_cluster(loaded.recipe.hardware if device_map is None else device_map.devices)
        shape = shape_of(loaded.recipe.model, self.recipe.parent)
        model, code = planned_code(loaded.recipe.model, self.recipe.parent, self.recipe)
        return make_plan("tiny", loaded.recipe.model_copy(update={"model": model}), cluster, shape, code, device_map)

    def prepare(self, *overrides: str, resume: bool = False) -> Plan:
        """Plan and prepare; the plan."""
        plan = self.plan(*overrides)
        self.run.create()
        if resume:
            plan = supervise.continue_from(plan, manifest.newest_valid(self.run)[0])
        supervise.write_run(plan, self.run, resume or self.run.plan.exists())
        self.fill(plan)
        return plan

    def fill(self, plan: Plan) -> None:
        """Model and data into the cache, and what of them this run reads into its directory."""
        supervise.Supervisor(plan, self.run, lambda event: None).prepare_only()

    def start(self, *overrides: str, resume: bool = False, **faults: Any) -> list[int]:
        """Plan, prepare and run all ranks to their end; their exit codes."""
        return self.ranks(self.prepare(*overrides, resume=resume), **faults)

    def ranks(
        self, plan: Plan, pretend: dict[str, Any] | None = None, fault: str = "", struck: Sequence[int] = ()
    ) -> list[int]:
        """Run all ranks of what is prepared to their end; their exit codes.

        Args:
            pretend: devices that each rank has, as `logical_devices.register` takes them.
            fault: code that runs in the ranks `struck` before anything else.
        """
        faults = {"fault": fault, "struck": list(struck)}
        return ask(self.server, plan=str(self.run.plan), ranks=plan.num_processes, pretend=pretend, **faults)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run)[0] if event["event"] == kind]

    def losses(self) -> dict[int, float]:
        """Step -> training loss; a later attempt's value counts."""
        return {event["step"]: event["loss"] for event in self.events("log")}

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.run.logs.glob("*rank*.log")))


def ask(server: subprocess.Popen[str], **job: Any) -> list[int]:
    """Have a job done; the exit codes of its ranks."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    codes: list[int] = json.loads(server.stdout.readline())
    return codes


@pytest.fixture(scope="session")
def rank_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name("rank_server.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as server:
        yield server
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """46 rows of sums, of unlike lengths."""
    rows = [
        {"instruction": f"Add {a} and {b}" + " please" * (a % 4), "output": f"The sum is {a + b}" + "." * (b % 3 + 1)}
        for a in range(2, 25)
        for b in (3, 8)
    ]
    path = tmp_path_factory.mktemp("data") / "sums.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="session")
def tiny_recipe(tiny_data: Path) -> Path:
    path = tiny_data.with_name("tiny.yaml")
    path.write_text(RECIPE.format(data=tiny_data))
    return path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all tests of the session, and not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAUNCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        if "TORCH_EXTENSIONS_DIR" not in os.environ:  # the ranks of the rank server get no variables of their own
            patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("operators")))
        yield


@pytest.fixture
def job(rank_server: subprocess.Popen[str], tiny_recipe: Path, tmp_path: Path) -> Job:
    return Job(rank_server, tiny_recipe, tmp_path / "run")


@pytest.fixture(scope="session")
def finished(rank_server: subprocess.Popen[str], tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """An uninterrupted run on two ranks; tests only read it."""
    done = Job(rank_server, tiny_recipe, tmp_path_factory.mktemp("finished") / "run")
    assert done.start() == [0, 0], done.logs()
    return done
