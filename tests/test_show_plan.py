"""What a person reads of a plan: devices and hosts counted, why there is no card, numbers in words."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from launcher.cluster import Cluster
from launcher.show import show_plan, summary
from launcher.start import Asked, Where, plan_recipe

RECIPES = Path(__file__).parent.parent / "recipes"


def text_of(recipe: str, *overrides: str, where: Where | None = None) -> str:
    """The plan of a shipped recipe as it is printed."""
    _, plan = plan_recipe(Asked(str(RECIPES / f"{recipe}.yaml"), overrides, where or Where()))
    screen = Console(file=io.StringIO(), highlight=False, soft_wrap=True)
    show_plan(screen, plan)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_hosts_and_unlike_devices_are_counted(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"node-{number} slots=8\n" for number in range(50)))
    text = text_of(
        "alpaca_qlora_1x12gb", "hardware=[4xRTX 3090, 4xT4]", "train.global_batch=400", where=Where(hostfile=str(hosts))
    )
    assert " · 200 × RTX 3090 + 200 × T4 on 50 hosts, ddp over nccl" in text


def test_why_there_is_no_card_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'Unable to determine the device handle'\nexit 9\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    said = "hardware = 2 × cpu: this machine's CPU (nvidia-smi failed: Unable to determine the device handle)"
    monkeypatch.setattr("launcher.cluster.hardware.usable_cores", lambda: 2)
    assert said in text_of("quickstart", "hardware=auto")
    assert "hardware =" not in text_of("quickstart", "hardware=2xcpu")


def test_one_is_no_plural() -> None:
    text = text_of("quickstart", "hardware=cpu", "train.epochs=1")
    assert "train        1 epoch, " in text
    assert "micro batch 8 × 1 rank × " in text
    assert "train        1 step, " in text_of("quickstart", "hardware=cpu", "train.max_steps=1")


def test_a_summary_of_many_devices_is_short() -> None:
    _, plan = plan_recipe(Asked(str(RECIPES / "quickstart.yaml"), ("hardware=[RTX 3060 Ti, RTX 3060 12GB]",)))
    many = Cluster(nodes=plan.cluster.nodes * 4000, source="")
    assert len(summary(plan.model_copy(update={"cluster": many}))) < 200


def test_what_of_a_recipe_is_not_as_it_looks_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    text = text_of("alpaca_lora_8xa800", "model.trust_remote_code=false", "data.max_length=4096")
    assert "model.trust_remote_code = false: code comes with the weights and will be needed" in text
    assert "knows 2,048 positions, and was not trained on more: data.max_length=2048" in text
    plain = text_of("alpaca_lora_8xa800", "data.max_length=2048")
    assert "model.trust_remote_code" not in plain
    assert "positions, and" not in plain
    novel = "model_type: novel, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 1, num_attention_heads: 4"
    novel = f"model={{config: {{{novel}, vocab_size: 99}}}}"
    assert "model.family = unknown: families.yaml does not know novel" in text_of("quickstart", novel)
