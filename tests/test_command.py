"""The very command lines that are started, as text."""

from __future__ import annotations

import base64
import shlex
from pathlib import Path

import pytest

from launcher.cluster import resolve_cluster
from launcher.command import Rendezvous, node_commands, prepare_command
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import load_recipe
from launcher.rundir import RunDir

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.command.sys.executable", "/venv/bin/python")
    monkeypatch.setattr("launcher.command._cores", lambda: 16)


def plan_of(name: str, *overrides: str) -> Plan:
    loaded = load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)
    cluster = resolve_cluster(loaded.recipe.hardware)
    return make_plan(name, loaded.recipe, cluster, shape_of(loaded.recipe.model, loaded.document.folder))


def test_ddp_on_eight_cards_is_one_torchrun() -> None:
    (command,) = node_commands(plan_of("alpaca_lora_8xa800"), RunDir(Path("/runs/a run")))
    assert str(command) == (
        "env OMP_NUM_THREADS=2 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONUNBUFFERED=1 "
        "GLOO_SOCKET_IFNAME=lo CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 "
        "HF_MODULES_CACHE='/runs/a run/code/no-module-cache' "
        "/venv/bin/python -m launcher.worker.torchrun --nnodes=1 --nproc-per-node=8 --rdzv-backend=c10d "
        "--rdzv-endpoint=127.0.0.1:0 --rdzv-id=alpaca_lora_8xa800 --local-addr=127.0.0.1 "
        "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT -m launcher.worker '/runs/a run/plan.json'"
    )


def test_deepspeeds_launcher_is_started_on_the_node_itself() -> None:
    (command,) = node_commands(plan_of("full_zero3_8xa800", "launch.backend=deepspeed"), RunDir(Path("/r")))
    world = base64.urlsafe_b64encode(b'{"localhost": [0, 1, 2, 3, 4, 5, 6, 7]}').decode()
    assert shlex.join(command.argv[1:]) == (
        f"-m launcher.worker.deepspeed --world_info={world} --node_rank=0 --master_addr=127.0.0.1 --master_port=0 "
        "--no_local_rank --log_level=warning --module launcher.worker /r/plan.json"
    )
    assert command.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"


def test_two_cpu_ranks_see_no_gpu_and_stay_on_loopback() -> None:
    (command,) = node_commands(plan_of("quickstart", "hardware=2xcpu", "launch.port=29777"), RunDir(Path("/r")))
    assert command.env["CUDA_VISIBLE_DEVICES"] == ""
    assert command.env["GLOO_SOCKET_IFNAME"] == "lo"
    assert command.env["OMP_NUM_THREADS"] == "8"
    assert "--rdzv-endpoint=127.0.0.1:29777" in command.argv


def test_deepspeed_compiles_once_a_version_and_with_the_ninja_of_this_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAUNCH_CACHE", "/cache")
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr("launcher.command.version", lambda name: {"torch": "2.13.0", "deepspeed": "0.19.8"}[name])
    plan = plan_of("full_zero3_8xa800")
    for command in (*node_commands(plan, RunDir(Path("/r"))), prepare_command(plan, RunDir(Path("/r")))):
        assert command.env["TORCH_EXTENSIONS_DIR"].startswith("/cache/operators-py3.")
        assert command.env["TORCH_EXTENSIONS_DIR"].endswith("-2.13.0-0.19.8")
        assert command.env["PATH"] == "/venv/bin:/usr/bin"
        assert command.env["DS_ACCELERATOR"] == "cuda"


def test_the_python_backend_starts_the_worker_itself() -> None:
    (command,) = node_commands(plan_of("quickstart", "hardware=1xcpu", "launch.backend=python"), RunDir(Path("/r")))
    assert command.argv == ("/venv/bin/python", "-m", "launcher.worker", "/r/plan.json")


def test_prepare_may_download_and_sees_no_gpu() -> None:
    command = prepare_command(plan_of("alpaca_lora_8xa800"), RunDir(Path("/r")))
    assert command.argv[1:] == ("-m", "launcher.worker.prepare", "/r/plan.json")
    assert command.env["CUDA_VISIBLE_DEVICES"] == ""
    assert "HF_HUB_OFFLINE" not in command.env


def test_a_command_line_is_what_a_shell_would_start() -> None:
    (command,) = node_commands(plan_of("alpaca_lora_8xa800"), RunDir(Path("/runs/it's $HOME; rm")))
    words = shlex.split(str(command))
    assert words[-len(command.argv) :] == list(command.argv)


def test_no_secret_is_part_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    (command,) = node_commands(plan_of("quickstart", "hardware=2xcpu"), RunDir(Path("/r")))
    assert "secret" not in str(command)


def test_two_nodes_meet_where_the_first_one_is_told_that_it_is_the_first(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node-a slots=8\nnode-b slots=2\n")
    loaded = load_recipe(ROOT / "recipes" / "full_fsdp_8xa800.yaml", ["train.global_batch=153"])
    cluster = resolve_cluster(loaded.recipe.hardware, hostfile=str(tmp_path / "hosts"), include="node-a node-b:1")
    plan = make_plan("x", loaded.recipe, cluster, shape_of(loaded.recipe.model, loaded.document.folder))
    commands = node_commands(plan, RunDir(Path("/r")), Rendezvous("10.0.0.1", 4321, ("eth0", "ib0")))
    for rank, (host, slots, seen, interface) in enumerate(
        (("node-a", 8, "0,1,2,3,4,5,6,7", "eth0"), ("node-b", 1, "1", "ib0"))
    ):
        command = commands[rank]
        assert command.host == host
        assert " ".join(command.argv[1:]) == (
            f"-m launcher.worker.torchrun --nnodes=2 --node-rank={rank} --nproc-per-node={slots} --master-addr=10.0.0.1 "
            "--master-port=4321 --rdzv-id=x --signals-to-handle=SIGINT,SIGHUP,SIGQUIT -m launcher.worker /r/plan.json"
        )
        assert command.env["CUDA_VISIBLE_DEVICES"] == seen
        assert (command.env["GLOO_SOCKET_IFNAME"], command.env["NCCL_SOCKET_IFNAME"]) == (interface, f"={interface}")
    unknown = node_commands(plan, RunDir(Path("/r")))[1]
    assert "--master-addr=node-a" in unknown.argv
    assert "GLOO_SOCKET_IFNAME" not in unknown.env


def test_what_is_compiled_is_kept_for_these_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_CACHE", "/cache")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (command,) = node_commands(plan_of("quickstart", "hardware=1xcpu", "train.compile=true"), RunDir(Path("/r")))
    assert command.env["TORCHINDUCTOR_CACHE_DIR"].startswith("/cache/compiled-py3.")
    (command,) = node_commands(plan_of("quickstart", "hardware=1xcpu"), RunDir(Path("/r")))
    assert "TORCHINDUCTOR_CACHE_DIR" not in command.env


def test_ranks_may_reach_the_hub_only_where_their_rows_come_from_it() -> None:
    stream = (
        "data.streaming=true",
        "train.max_steps=9",
        "data.eval=null",
        "data.path=hf://datasets/org/name/rows.jsonl",
    )
    plan = plan_of("quickstart", "hardware=1xcpu", *stream)
    assert plan.recipe.data.path == "hf://datasets/org/name/rows.jsonl"
    (command,) = node_commands(plan, RunDir(Path("/r")))
    assert "HF_HUB_OFFLINE" not in command.env
    assert "HF_HUB_OFFLINE" not in prepare_command(plan, RunDir(Path("/r"))).env
