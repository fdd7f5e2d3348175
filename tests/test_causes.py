"""What is known of a cause, beyond its message. In a run: tests/e2e/test_failures.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.causes import killed, lost_connection, reason_of
from launcher.cluster import GIB, oom_kills, resolve_cluster
from launcher.modelshape import shape_of
from launcher.plan import Plan, make_plan
from launcher.recipe import find_recipe, load_recipe

BEAT = {"memory": {"rss": 5 * GIB, "available": GIB // 4}}
ALLOCATE = "import sys, time; open(sys.argv[1], 'w').write(str(__import__('os').getpid())); b = bytearray(1 << 30); time.sleep(60)"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    recipe = load_recipe(
        find_recipe("alpaca_lora_8xa800"), ["train.micro_batch=8", "train.gradient_checkpointing=true"]
    )
    shape = shape_of(recipe.recipe.model, tmp_path_factory.mktemp("nothing"))
    return make_plan("alpaca", recipe.recipe, resolve_cluster(recipe.recipe.hardware), shape)


def error(kind: str, message: str = "", **more: object) -> dict[str, object]:
    return {"type": kind, "message": message, "rank": 3, **more}


def test_memory_of_a_card_with_its_plan_and_batch(plan: Plan) -> None:
    taken = {"rss": GIB, "available": GIB, "reserved": 70 * GIB, "free": GIB, "total": 80 * GIB, "allocated": 60 * GIB}
    told = reason_of(
        error("torch.OutOfMemoryError", memory=taken, batch=[8, 700, [f"a.json {row}" for row in range(1, 9)]]), plan
    )
    assert told is not None
    planned, batch, rows = told.notes
    assert planned.endswith(
        f"GiB of 80.00 GiB on {plan.cluster.devices[3].name}; this rank had 70.00 GiB, others 9.00 GiB"
    )
    most = 8 * plan.recipe.data.max_length
    assert batch == f"this batch had 8 × 700 = 5,600 tokens; the plan is for {most:,} at most"
    assert rows == "its rows, the longest first: a.json 1, a.json 2, a.json 3, a.json 4, a.json 5, a.json 6 and 2 more"
    assert told.to_type == "launch resume RUN train.micro_batch=4"


@pytest.mark.parametrize(
    ("kind", "message", "found"),
    [
        ("MemoryError", "", "host memory is full"),
        ("RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …", "host memory is full"),
        ("torch.AcceleratorError", "CUDA error: no kernel image is available for execution on the device", "no kernels for this card"),
        ("RuntimeError", "The NVIDIA driver on your system is too old (found version 11040)", "the driver is older"),
        ("ImportError", "libtorch.so: undefined symbol: _ZN3c10", "do not belong together"),
        ("ImportError", "cannot import name 'x' from 'transformers'", "do not belong together"),
        ("RuntimeError", "CUDA error: device-side assert triggered", "token ids beyond the vocabulary"),
        ("RuntimeError", "CUDA error: uncorrectable ECC error encountered", "the card has failed"),
        ("OSError", "[Errno 24] Too many open files: '/x'", "may open no more files"),
    ],
)  # fmt: skip
def test_messages_in_plain_words(kind: str, message: str, found: str, plan: Plan) -> None:
    told = reason_of(error(kind, message), plan)
    assert told is not None
    assert found in told.found
    assert told.to_type


def test_of_other_errors_nothing_is_claimed(plan: Plan) -> None:
    assert reason_of(error("ValueError", "No module named x"), plan) is None
    assert reason_of(error("RuntimeError", "shapes do not match"), plan) is None
    assert lost_connection("shapes do not match") is None
    assert lost_connection("[gloo/transport/tcp/pair.cc:553] Connection closed by peer") is not None


def test_the_kernel_is_blamed_only_where_it_counted_a_kill(plan: Plan) -> None:
    assert killed(1, BEAT, plan).found.startswith("killed by the kernel's OOM killer")
    assert killed(0, BEAT, plan).found.startswith("killed by somebody")
    assert killed(None, BEAT, plan).found.startswith("killed (SIGKILL): by somebody, or by the kernel")
    assert killed(1, BEAT, plan).notes == (
        "just before, this rank had 5.00 GiB of host memory, and 0.25 GiB were left",
    )
    assert killed(1, {}, plan).notes == ()


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/a/b", {"a/b/memory.events": "low 0\noom 9\noom_kill 2\noom_group_kill 7\n", "a/memory.events": "oom_kill 5\n"}, 2),
        ("0::/", {"memory.events": "oom_kill 3\n"}, 3),
        ("4:memory:/a", {"memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"}, 4),
        ("4:memory:/elsewhere", {"memory/memory.oom_control": "under_oom 0\noom_kill 1\n"}, 1),
        ("0::/", {}, 6),
    ],
    ids=["v2", "v2 in a container", "v1", "v1 in a container", "no group"],
)  # fmt: skip
def test_who_counts_what_the_kernel_kills(group: str, files: dict[str, str], expected: int, tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(f"{group}\n")
    (proc / "vmstat").write_text("nr_free_pages 1\noom_kill 6\n")
    for name, text in files.items():
        (cgroup / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / name).write_text(text)
    assert oom_kills(proc, cgroup) == expected
    assert oom_kills(tmp_path / "none", tmp_path / "none") is None


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 64 MiB."""
    for folder, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = folder / f"launch-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(64 * 2**20))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("no control group can be made here")


def test_a_kill_of_the_kernel_moves_the_count(small_group: Path, tmp_path: Path) -> None:
    enter = f"import os; open({str(small_group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()));"
    count = f"{enter} from launcher.cluster import oom_kills; print(oom_kills())"

    def counted() -> int:
        return int(subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True).stdout)

    before = counted()
    done = subprocess.run([sys.executable, "-c", f"{enter} {ALLOCATE}", str(tmp_path / "pid")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert counted() == before + 1
