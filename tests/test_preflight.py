"""What stands in the way of a start is found before it, each with what to type: packages, cards, memory, limits, files, disks, ports."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.cluster import (
    GIB,
    MIB,
    Cluster,
    Device,
    available_memory_bytes,
    driver_version,
    nvidia_on_the_bus,
    process_limit,
    resolve_cluster,
)
from launcher.command import worker_environment
from launcher.modelshape import shape_of, shape_of_config
from launcher.plan import Plan, make_plan
from launcher.preflight import Finding, check, diagnose, environment, packages
from launcher.preflight.devices import devices, rehearsal
from launcher.preflight.disk import checkpoint_bytes, room
from launcher.preflight.files import model_files
from launcher.preflight.machine import limits
from launcher.preflight.plan import _compiler
from launcher.preflight.plan import check as check_plan
from launcher.preflight.port import owner, port
from launcher.recipe.device_maps import DeviceMap, load_device_map
from launcher.recipe.schema import Recipe
from launcher.recipe.shipped import shipped_folder

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4000000000\n"


def planned(model: dict[str, Any], hardware: str = "2xcpu", **sections: Any) -> Plan:
    values = {"model": model, "data": {"path": "rows.json", "max_length": 32}, "hardware": hardware, **sections}
    recipe = Recipe.model_validate(values)
    return make_plan("tiny", recipe, resolve_cluster(recipe.hardware), shape_of(recipe.model, Path()))


def model_folder(folder: Path, *names: str) -> dict[str, Any]:
    """A folder with a config and files of these names that hold nothing of interest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in names:
        (folder / name).write_text("{}")
    return {"path": str(folder)}


def one(findings: Iterable[Finding], what: str) -> Finding:
    (found,) = [finding for finding in findings if what in finding.what]
    return found


def cards(*names: str) -> Cluster:
    return resolve_cluster(names)


# --- findings as such


def test_every_finding_that_is_not_ok_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_CACHE", str(tmp_path))
    for finding in [*check(planned({"config": CONFIG}, "8xA800-80GB"), tmp_path), *diagnose()]:
        assert (finding.level == "ok") == (finding.to_type == ""), finding


# --- packages


@pytest.mark.parametrize(
    ("installed", "level", "words"),
    [
        ("2.13.0+cu130", "ok", "torch 2.13.0+cu130"),
        ("2.10.1", "warning", "2.10.1 is here, tested is <2.14,>=2.11"),
        ("2.14.0", "warning", "tested is <2.14,>=2.11"),
        (None, "error", "is not installed"),
    ],
)
def test_versions_are_held_against_our_own_metadata(
    installed: str | None, level: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["torch<2.14,>=2.11", 'bitsandbytes>=0.48; extra == "bitsandbytes"', 'pytest>=8; extra == "test"']
    monkeypatch.setattr(packages.importlib.metadata, "requires", lambda _: texts)
    monkeypatch.setattr(packages, "version_of", lambda name: installed if name == "torch" else None)
    findings = list(packages.ranges_kept())
    found = findings[0]
    assert (found.level, words in found.found) == (level, True), found
    assert level == "ok" or found.to_type == "pip install 'torch<2.14,>=2.11'"
    assert not any("pytest" in str(finding) or "bitsandbytes" in str(finding) for finding in findings)


def test_the_ranges_of_this_installation_are_read() -> None:
    assert packages.required()["torch"] == ("<2.14,>=2.11", False)
    assert packages.required()["deepspeed"][1], "an extra"


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("from typing import Optional\n__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n", "13.0"),
        ("__version__ = '2.13.0'\ncuda = '12.8'\n", "12.8"),
        ("cuda: Optional[str] = None\n", None),
    ],
)
def test_the_cuda_version_of_torch_is_read_without_importing_it(
    text: str, cuda: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(text)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: spec)
    assert packages.torch_cuda() == cuda


@pytest.mark.parametrize(
    ("cuda", "driver", "level", "words"),
    [
        (None, "580.82.07", "error", "is a build for CPUs, and there are 2 cards"),
        ("13.0", "535.104.05", "warning", "wants driver 580 or newer; 535.104.05 is here"),
        ("12.8", "535.104.05", "ok", "is built for CUDA 12.8, the driver is 535.104.05"),
        ("14.0", "580.82.07", "ok", "CUDA 14.0"),
        ("13.0", None, "ok", "the driver is unknown"),
    ],
)
def test_torch_is_held_against_the_cards(
    cuda: str | None, driver: str | None, level: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "torch_cuda", lambda: cuda)
    monkeypatch.setattr(packages, "driver_version", lambda: driver)
    (found,) = packages.torch_wheel(cards("RTX 3090", "RTX 3090"))
    assert (found.level, words in found.found) == (level, True), found


def test_a_card_without_a_driver_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, vendor, kind in (("0", "0x8086", "0x030000"), ("1", "0x10de", "0x040300")):
        (tmp_path / "bus/pci/devices" / name).mkdir(parents=True)
        (tmp_path / "bus/pci/devices" / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / "bus/pci/devices" / name / "class").write_text(f"{kind}\n")
    assert not nvidia_on_the_bus(tmp_path), "another maker's card, and an NVIDIA audio device"
    (tmp_path / "bus/pci/devices/1/class").write_text("0x030200\n")
    assert nvidia_on_the_bus(tmp_path)

    monkeypatch.setattr(packages, "nvidia_on_the_bus", lambda: True)
    (found,) = packages.torch_wheel(resolve_cluster("2xcpu"))
    assert found.level == "warning"
    assert "--gpus all" in found.to_type


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 11.4.0",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (dvs-builder@U16)",
    ],
)
def test_the_driver_is_what_the_kernel_says(line: str, tmp_path: Path) -> None:
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    (tmp_path / "driver/nvidia/version").write_text(line)
    assert driver_version(tmp_path) == "535.104.05"


def test_the_driver_is_what_nvidia_smi_says_where_the_kernel_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version(tmp_path) is None
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 560.35.03\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert driver_version(tmp_path) == "560.35.03"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert driver_version(tmp_path) is None


# --- memory and limits


@pytest.mark.parametrize(
    ("files", "expected_mib"),
    [
        ({}, 6000),
        ({"job/memory.max": "max", "job/memory.current": "1"}, 6000),
        ({"job/memory.max": 2000 * MIB, "job/memory.current": 1500 * MIB}, 500),
        (
            {
                "job/memory.max": 2000 * MIB,
                "job/memory.current": 1500 * MIB,
                "job/memory.stat": f"anon 1\ninactive_file {300 * MIB}\n",
            },
            800,
        ),
    ],
    ids=["no limit", "max", "below a limit", "cached files give way"],
)
def test_available_memory_is_what_the_container_has_left(
    files: dict[str, Any], expected_mib: int, tmp_path: Path
) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {8000 * 1024} kB\nMemAvailable: {6000 * 1024} kB\n")
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    for name, value in files.items():
        (cgroup / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / name).write_text(str(value))
    assert available_memory_bytes(proc, cgroup) == expected_mib * MIB


def test_the_containers_process_limit(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/job\n")
    (cgroup / "job").mkdir(parents=True)
    assert process_limit(proc, cgroup) is None
    (cgroup / "job" / "pids.max").write_text("max\n")
    assert process_limit(proc, cgroup) is None
    (cgroup / "pids.max").write_text("100\n")
    assert process_limit(proc, cgroup) == 100


def test_cpu_ranks_that_exceed_the_memory_are_named_with_the_exit_code_that_would_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned({"config": CONFIG})
    assert one(check_plan(plan, tmp_path), "host memory").level == "ok"
    monkeypatch.setattr("launcher.preflight.plan.available_memory_bytes", lambda: 2 * plan.memory.total_bytes - 1)
    found = one(check_plan(plan, tmp_path), "host memory")
    assert found.level == "warning"
    assert "2 ranks" in found.found
    assert "exit code -9" in found.found
    assert "--nproc 1" in found.to_type


@pytest.mark.parametrize(
    ("stored", "quantization", "copies"),
    [("BF16", "none", 0), ("F16", "none", 2), ("F16", "nf4", 0)],
    ids=["mapped", "cast", "quantised"],
)
def test_weights_that_each_rank_casts_are_counted_once_a_rank(
    stored: str, quantization: str, copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder(tmp_path, "tokenizer.json")
    num = shape_of_config(CONFIG, "tiny", "").num_parameters
    header = json.dumps({"a": {"dtype": stored, "shape": [num], "data_offsets": [0, 2 * num]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2 * num))
    plan = planned({**model, "quantization": quantization, "dtype": "bf16"}, "2xA800-80GB")
    monkeypatch.setattr("launcher.plan.host.CPU_CONTEXT_BYTES", 0)
    found = one(check_plan(plan, tmp_path), "host memory").found
    size = float(re.match(r"(\d+) MiB", found)[1])  # type: ignore[index]
    assert size == pytest.approx(copies * plan.shape.num_parameters * 2 / MIB, abs=0.6), found


def test_offloaded_state_is_host_memory(tmp_path: Path) -> None:
    strategy = {"type": "zero2", "offload": "optimizer"}
    plan = planned({"config": CONFIG}, "2xA800-80GB", strategy=strategy, adapter={"type": "full"})
    assert "of offloaded state" in one(check_plan(plan, tmp_path), "host memory").found
    disk = {"type": "zero3", "offload": "parameters", "nvme_path": str(tmp_path / "disk")}
    plan = planned({"config": CONFIG}, "2xA800-80GB", strategy=disk, adapter={"type": "full"})
    assert (
        "needed for what is offloaded"
        in one(check_plan(plan, tmp_path), f"strategy.nvme_path {tmp_path / 'disk'}").found
    )


@pytest.mark.parametrize(
    ("kind", "ranks", "total", "free", "level"),
    [
        ("cuda", 2, 64 * MIB, 64 * MIB, "warning"),
        ("cuda", 8, 64 * GIB, 64 * GIB, "ok"),
        ("cuda", 8, 64 * GIB, 10 * MIB, "warning"),
        ("cuda", 1, 64 * MIB, 64 * MIB, "ok"),
        ("cpu", 4, 64 * MIB, 64 * MIB, "ok"),
    ],
)
def test_shared_memory(
    kind: str, ranks: int, total: int, free: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=total, free=free, used=total - free)
    monkeypatch.setattr("launcher.preflight.machine.shutil.disk_usage", lambda _: usage)
    found = one(limits(kind, ranks, tmp_path), str(tmp_path))
    assert found.level == level
    assert level == "ok" or ("--shm-size=" in found.to_type or "ls -l" in found.to_type)


def test_a_container_without_shared_memory(tmp_path: Path) -> None:
    found = one(limits("cuda", 2, tmp_path / "shm"), "shm")
    assert (found.level, "--shm-size=1g" in found.to_type) == ("warning", True)


@pytest.mark.parametrize(("hard", "typed"), [(4096, "ulimit -n 4096"), (512, "--ulimit nofile")])
def test_too_few_open_files(hard: int, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.preflight.machine.resource.getrlimit", lambda _: (256, hard))
    found = one(limits("cpu", 1), "open files")
    assert found.level == "warning"
    assert typed in found.to_type


def test_too_few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr("launcher.preflight.machine.resource.getrlimit", lambda _: (unlimited, unlimited))
    monkeypatch.setattr("launcher.preflight.machine.process_limit", lambda: 100)
    found = one(limits("cpu", 8), "processes")
    assert (found.level, "100 are allowed" in found.found) == ("warning", True)
    assert "--pids-limit" in found.to_type


@pytest.mark.parametrize(
    ("soft", "hard", "typed"),
    [
        (100, 4000, "ulimit -u 4000"),
        (100, resource.RLIM_INFINITY, "ulimit -u unlimited"),
        (100, 100, "/etc/security/limits.conf"),
    ],
)
def test_too_few_processes_of_a_user_who_is_not_root(
    soft: int, hard: int, typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.preflight.machine.os.geteuid", lambda: 1000)
    monkeypatch.setattr("launcher.preflight.machine.process_limit", lambda: None)
    monkeypatch.setattr("launcher.preflight.machine.resource.getrlimit", lambda _: (soft, hard))
    found = one(limits("cpu", 8), "processes")
    assert (found.level, typed in found.to_type) == ("warning", True)


# --- the model's files


def test_a_whole_folder(tmp_path: Path) -> None:
    plan = planned(model_folder(tmp_path, "tokenizer.json", "pytorch_model.bin"))
    assert [finding.level for finding in model_files(plan)] == ["ok"]


def with_index(folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_text("{}")
    shards = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))


def torn_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
        file.writestr("data.pkl", bytes(5000))
    os.truncate(folder / "pytorch_model.bin", 3000)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (with_index, ["no pytorch_model-00002-of-00002.bin", "copy pytorch_model-00002-of-00002.bin there"]),
        (torn_zip, ["pytorch_model.bin is cut short (3000 bytes)", "download it again"]),
        (
            lambda folder: (folder / "pytorch_model.bin").write_text(POINTER),
            ["pytorch_model.bin is a pointer of git lfs", "lfs pull"],
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["no tokenizer (tokenizer*", "model.path=DIR"]),
        (lambda folder: (folder / "pytorch_model.bin").unlink(), ["no weights (*.safetensors, *.bin)"]),
    ],
    ids=["missing shard", "torn", "pointer", "no tokenizer", "no weights"],
)
def test_a_folder_that_is_not_whole(damage: Callable[[Path], object], words: list[str], tmp_path: Path) -> None:
    model = model_folder(tmp_path, "tokenizer.json", "pytorch_model.bin")
    damage(tmp_path)
    (found,) = model_files(planned(model))
    assert found.level == "error"
    for word in words:
        assert word in f"{found.found} {found.to_type}"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with an incomplete snapshot of org/name: its second shard was never fetched."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    repository = tmp_path / "hf/hub/models--org--name"
    folder = repository / "snapshots/abc"
    model_folder(folder, "tokenizer.json", "pytorch_model.bin")
    with_index(folder)
    (folder / "pytorch_model-00002-of-00002.bin").symlink_to("../../blobs/never-fetched")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    return folder


def test_a_snapshot_that_lacks_a_shard_is_completed_or_refused(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned({"path": "org/name"})
    (found,) = model_files(plan)
    assert found == Finding(
        "ok", "model.path: org/name", "will be fetched from the hub by prepare: pytorch_model-00002-of-00002.bin"
    )
    assert "the download of org/name" in one(room(plan, tmp_path), "hub cache").found
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    (found,) = model_files(plan)
    assert (found.level, "lacks pytorch_model-00002-of-00002.bin" in found.found) == ("error", True)
    assert "HF_HUB_OFFLINE=0 launch prepare RECIPE" in found.to_type


def test_a_snapshot_that_is_whole_needs_no_hub(snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf/hub/models--org--name/blobs").mkdir()
    (tmp_path / "hf/hub/models--org--name/blobs/never-fetched").write_text("{}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = planned({"path": "org/name"})
    assert [(finding.level, finding.found) for finding in model_files(plan)] == [
        ("ok", "is in the hub cache, every file of it")
    ]
    assert not [finding for finding in room(plan, tmp_path) if finding.what == "hub cache"]


# --- disks


def free_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = SimpleNamespace(total=10 * free, free=free, used=9 * free)
    monkeypatch.setattr("launcher.preflight.disk.shutil.disk_usage", lambda _: usage)


@pytest.mark.parametrize(
    ("sections", "bytes_a_parameter"),
    [
        ({}, 12),
        ({"adapter": {"type": "full"}}, 12),
        ({"adapter": {"type": "full"}, "strategy": {"type": "fsdp"}}, 12),
        ({"adapter": {"type": "full"}, "strategy": {"type": "zero2"}}, 14),
        ({"adapter": {"type": "adalora"}}, 16),
        ({"train": {"optimizer": "adamw_8bit"}}, 6.03),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_checkpoint_is_what_is_trained_and_its_optimizers_state(
    sections: dict[str, Any], bytes_a_parameter: float
) -> None:
    plan = planned({"config": CONFIG, "dtype": "bf16"}, "2xA800-80GB", **sections)
    assert checkpoint_bytes(plan) - 16 * MIB == round(plan.trainable_parameters * bytes_a_parameter)


def test_checkpoints_that_are_there_already_want_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned({"config": CONFIG})
    free_disk(monkeypatch, checkpoint_bytes(plan))
    found = one(room(plan, tmp_path / "run"), "run directory")
    assert (found.level, "for 2 + 1 checkpoints of 16 MiB" in found.found) == ("error", True)
    assert "checkpoint.keep=1" in found.to_type
    for step in (1, 2):
        folder = tmp_path / f"run/checkpoints/step-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(checkpoint_bytes(plan)))
    assert one(room(plan, tmp_path / "run"), "run directory").level == "ok"


def test_the_best_checkpoint_stays_beside_the_last_ones(tmp_path: Path) -> None:
    sections = {"train": {"early_stopping": {"patience": 2}}}
    rows = {"path": "rows.json", "max_length": 32, "eval": {"rows": 2}}
    found = one(room(planned({"config": CONFIG}, data=rows, **sections), tmp_path), "run directory").found
    assert "64 MiB needed for 2 + 1 checkpoints and the best one" in found


def test_a_copy_that_is_made_in_the_cache_and_the_checkpoints_share_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCH_CACHE", str(tmp_path / "cache"))
    plan = planned({"config": {**CONFIG, "vocab_size": 300_000}})
    copy = 4 * plan.shape.num_parameters
    free_disk(monkeypatch, copy + 3 * checkpoint_bytes(plan) - 1)
    cache, run = room(plan, tmp_path / "run")
    assert (cache.level, run.level) == ("ok", "error")
    assert "free after the above" in run.found
    free_disk(monkeypatch, copy // 2)
    cache, _ = room(plan, tmp_path / "run")
    assert (cache.level, "LAUNCH_CACHE=DIR" in cache.to_type) == ("error", True)
    (tmp_path / "cache/model-0123").mkdir(parents=True)
    (tmp_path / "cache/model-0123/model.safetensors").write_bytes(bytes(copy))
    cache, _ = room(plan, tmp_path / "run")
    assert cache.level == "warning", "it may be this model's copy"


def test_a_run_directory_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = one(room(planned({"config": CONFIG}), tmp_path / "file/run"), "run directory")
    assert (found.level, "is no folder" in found.found) == ("error", True)


# --- ports


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_taken_port_names_its_owner(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip(f"{address} cannot be had here")
    with server:
        number = server.getsockname()[1]
        assert owner(number) == os.getpid()
        found = list(port(number))
    if family is socket.AF_INET:
        assert f"by process {os.getpid()} (" in found[0].found
        assert f"kill {os.getpid()}" in found[0].to_type
    assert owner(number) is None
    assert [finding.level for finding in port(number)] == ["ok"]


def test_the_port_of_a_process_that_may_not_be_looked_at(tmp_path: Path) -> None:
    line = "   0: 0100007F:738C 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 4242 1 0"
    (tmp_path / "net").mkdir()
    (tmp_path / "net/tcp").write_text(f"  sl  local_address …\n{line}\n")
    (tmp_path / "17").mkdir()
    assert owner(0x738C, tmp_path) is None
    (tmp_path / "17/fd").mkdir()
    (tmp_path / "17/fd/3").symlink_to("socket:[4242]")
    assert owner(0x738C, tmp_path) == 17
    assert owner(0x738D, tmp_path) is None


# --- devices


def test_cards_with_too_little_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned({"config": CONFIG}, "2xRTX-3090")
    full: Device = plan.cluster.devices[0].model_copy(update={"reserved_bytes": 24 * GIB})
    node = plan.cluster.nodes[0].model_copy(update={"devices": (plan.cluster.devices[0], full)})
    here = plan.cluster.model_copy(update={"nodes": (node,)})
    monkeypatch.setattr("launcher.preflight.plan.found_on_this_machine", lambda: here)
    found = [finding for finding in check_plan(plan, tmp_path) if "RTX 3090 has 0.0 GiB free" in finding.found]
    assert [finding.level for finding in found] == ["error"]


def spread_over(*names: str) -> Plan:
    """A plan of a device map over these cards, one layer on each."""
    strategy = {"type": "device_map", "device_map": "2gpu-mixed", "schedule": "naive"}
    values = {"model": {"config": CONFIG}, "data": {"path": "rows.json", "max_length": 32}, "strategy": strategy}
    recipe = Recipe.model_validate({**values, "hardware": names})
    placed = DeviceMap(devices=names, placement=("0-0", "1-1"))
    shape = shape_of(recipe.model, Path())
    return make_plan("tiny", recipe, resolve_cluster(recipe.hardware), shape, device_map=placed)


@pytest.mark.parametrize(
    ("here", "found"),
    [
        (("RTX 3060 Ti", "RTX 3060 12GiB"), None),
        (("RTX 3060 12GiB", "RTX 3060 Ti"), "RTX 3060 12GB is here instead of RTX 3060 Ti"),
        (("RTX 3060 Ti",), r"2 devices planned, 1 here \(1 × RTX 3060 Ti\)"),
        (("RTX 3060 Ti reserved=8191MiB", "RTX 3060 12GiB"), "RTX 3060 Ti has 0.0 GiB free, 0.6 GiB are planned"),
    ],
)
def test_the_cards_of_a_device_map_have_to_be_the_planned_ones(here: tuple[str, ...], found: str | None) -> None:
    findings = list(devices(spread_over("RTX 3060 Ti", "RTX 3060 12GiB"), resolve_cluster(here)))
    if found is None:
        assert findings == []
    else:
        assert findings[0].level == "error"
        assert re.fullmatch(found, findings[0].found)
        assert findings[0].to_type


def test_cards_known_by_uuid_may_lie_in_another_order() -> None:
    plan = spread_over("RTX 3060 Ti", "RTX 3060 12GiB")
    plan_node, here = plan.cluster.nodes[0], resolve_cluster(("RTX 3060 12GiB", "RTX 3060 Ti"))
    known = [device.model_copy(update={"uuid": device.name}) for device in plan_node.devices]
    node = here.nodes[0].model_copy(
        update={"devices": tuple(device.model_copy(update={"uuid": device.name}) for device in here.devices)}
    )
    cluster = plan.cluster.model_copy(update={"nodes": (plan_node.model_copy(update={"devices": tuple(known)}),)})
    assert not list(devices(plan.model_copy(update={"cluster": cluster}), here.model_copy(update={"nodes": (node,)})))
    backwards = plan.model_copy(update={"cluster": cluster, "stages": tuple(reversed(plan.stages))})
    assert worker_environment(backwards)["CUDA_VISIBLE_DEVICES"] == "RTX 3060 12GB,RTX 3060 Ti"


@pytest.mark.parametrize(
    ("name", "device_map", "typed"),
    [
        ("chatglm2_lora_2gpu_mixed", "2gpu-mixed", "launch --device-map 2gpu-mixed --rehearse"),
        ("mine", "3gpu-consumer", "launch RECIPE --device-map 3gpu-consumer --rehearse"),
        ("mine", "elsewhere/map.yaml", "launch RECIPE --device-map elsewhere/map.yaml --rehearse"),
    ],
)
def test_how_to_rehearse_names_what_was_typed(name: str, device_map: str, typed: str) -> None:
    plan = spread_over("RTX 3060 Ti", "RTX 3060 12GiB")
    file = shipped_folder() / "device_maps" / f"{device_map}.yaml"
    placed = load_device_map(device_map).device_map if file.is_file() else plan.device_map
    strategy = plan.recipe.strategy.model_copy(update={"device_map": str(file) if file.is_file() else device_map})
    recipe = plan.recipe.model_copy(update={"strategy": strategy})
    changed = plan.model_copy(update={"name": name, "recipe": recipe, "device_map": placed})
    assert rehearsal(changed).endswith(typed)


# --- environment.json


def test_the_environment_is_json_and_holds_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    value = environment(resolve_cluster("2xcpu"))
    text = json.dumps(value)
    assert "hf_very_secret" not in text
    assert set(value["limits"]) == {"open_files", "processes", "locked_memory_bytes", "container"}
    assert value["limits"]["open_files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < value["memory_available_bytes"] <= value["memory_bytes"]
    assert value["shared_memory_bytes"] == shutil.disk_usage("/dev/shm").total
    assert value["packages"]["torch"]
    assert not [name for name, content in os.environ.items() if len(content) > 30 and content in text]


@pytest.mark.parametrize(
    ("hardware", "has", "found"),
    [
        ("1xcpu", {"g++"}, "ok /usr/bin/g++"),
        ("1xcpu", set(), "error torch.compile needs a C++ compiler, and there is no g++ or clang++"),
        ("1xA100-80GB", {"gcc", "triton"}, "ok /usr/bin/gcc"),
        ("1xA100-80GB", {"gcc"}, "error torch.compile needs Triton, which is not installed"),
        ("1xA100-80GB", set(), "error torch.compile's Triton needs a C compiler, and there is no gcc or clang or cc"),
    ],
)
def test_torch_compile_finds_what_it_makes_kernels_with(
    monkeypatch: pytest.MonkeyPatch, hardware: str, has: set[str], found: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in has else None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name in has or None if name == "triton" else find_spec(name)
    )
    plan = planned({"config": CONFIG}, hardware, train={"compile": True})
    (finding,) = _compiler(plan)
    assert f"{finding.level} {finding.found}" == found
    assert not list(_compiler(planned({"config": CONFIG}, hardware)))
