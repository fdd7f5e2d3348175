"""hardware: of a recipe, nvidia-smi (a fake on PATH) and /proc -> Cluster."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from launcher.cluster import (
    GIB,
    MIB,
    Cluster,
    card,
    card_names,
    card_of,
    found_on_this_machine,
    host_memory_bytes,
    on_this_machine,
    resolve_cluster,
    this_machine,
)
from launcher.cluster.nvidia import visible_places
from launcher.errors import UsageError

TWO_CARDS = """\
0, GPU-aaaa1111, NVIDIA GeForce RTX 3060 Ti, 8192, 921, 8.6
1, GPU-bbbb2222, Tesla V100-SXM2-32GB, 32768, 0, 7.0
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a fake nvidia-smi on PATH: it refuses options that we do not pass, prints `answer` and exits with `code`."""

    def install(answer: str | bytes, code: int = 0) -> None:
        (tmp_path / "answer").write_bytes(answer if isinstance(answer, bytes) else answer.encode())
        fake = tmp_path / "nvidia-smi"
        fake.write_text(
            '#!/bin/sh\n[ "$1 $2" = "--query-gpu=index,uuid,name,memory.total,memory.used,compute_cap '
            f'--format=csv,noheader,nounits" ] || exit 99\ncat {tmp_path}/answer\nexit {code}\n'
        )
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return install


def test_cards_of_a_list_are_found_in_another_order(nvidia_smi):
    wanted = resolve_cluster(("V100-32GB", "RTX 3060 Ti"))
    nvidia_smi(TWO_CARDS)
    assert [device.uuid for device in on_this_machine(wanted).devices] == ["GPU-bbbb2222", "GPU-aaaa1111"]
    assert on_this_machine(wanted).source == wanted.source
    for others in (("V100-32GB", "V100-32GB"), ("RTX 3060 Ti", "RTX 3060 12GB")):
        not_here = resolve_cluster(others)
        assert on_this_machine(not_here) == not_here


def test_of_like_cards_the_emptier_is_the_one_with_less_reserved(nvidia_smi):
    alike = [f"{n}, GPU-{n}, NVIDIA GeForce RTX 3060, 12288, {used}, 8.6" for n, used in enumerate((9000, 3))]
    nvidia_smi("\n".join(alike) + "\n")
    for reserved, uuids in ((("", " reserved=9GiB"), ["GPU-1", "GPU-0"]), ((" reserved=9GiB", ""), ["GPU-0", "GPU-1"])):
        wanted = resolve_cluster(tuple(f"RTX 3060 12GiB{text}" for text in reserved))
        assert [device.uuid for device in on_this_machine(wanted).devices] == uuids


@pytest.fixture
def no_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_profile_is_that_many_cards():
    cluster = resolve_cluster("8xA800-80GB")
    assert (cluster.num_nodes, cluster.num_devices, cluster.kind) == (1, 8, "cuda")
    assert cluster.source == "hardware: 8xA800-80GB"
    assert [device.index for device in cluster.devices] == list(range(8))
    assert {(device.name, device.memory_bytes, device.bf16, device.uuid) for device in cluster.devices} == {
        ("A800-80GB", 80 * GIB, True, None)
    }


def test_a_list_of_unlike_cards_keeps_order_and_what_the_display_takes():
    cluster = resolve_cluster(("RTX 3060 Ti 8GiB reserved=921MiB", "RTX 3060 12GiB"))
    assert [(device.name, device.memory_bytes, device.reserved_bytes) for device in cluster.devices] == [
        ("RTX 3060 Ti", 8 * GIB, 921 * MIB),
        ("RTX 3060 12GB", 12 * GIB, 0),
    ]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("a800 80gb", "A800-80GB"),
        ("A100-40GB", "A100-40GB"),
        ("2 x rtx 3060-ti", "RTX 3060 Ti"),
        ("GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("Tesla T4", "T4"),
        ("L4 24GB", "L4"),
        ("h200", "H200-141GB"),
    ],
)
def test_names_are_matched_without_case_blanks_and_hyphens(written, meant):
    assert resolve_cluster(written).devices[0].name == meant


@pytest.mark.parametrize(
    ("hardware", "found", "to_type"),
    [
        ("8xA900", "no card is called `A900`", "`A800-80GB`"),
        ("RTX 3066 Ti", "no card is called `RTX 3066 Ti`", "`RTX 3060 Ti`"),
        ("A100", "`A100` is sold as A100-40GB and A100-80GB", "`A100-80GB`"),
        ("RTX 3060 Ti 12GiB", "`RTX 3060 Ti 12GiB` is sold as RTX 3060 Ti", "`RTX 3060 Ti`"),
        ("RTX 4090 16GB", "sold as RTX 4090, with 24 GiB", "`RTX 4090 reserved=8GiB` for one that has 16 GiB"),
        ("RTX 3090 reserved=lots", "`reserved=lots` is no option", "reserved=921MiB"),
        ("RTX 3090 reserved=1GiB reserved=2GiB", "says twice", "`RTX 3090 reserved=921MiB`"),
        ("2xRTX 3060 12GB reserved=13GiB", "leaves nothing of the 12 GiB of a RTX 3060 12GB", "reserved=921MiB"),
        (f"RTX 3090 reserved={'9' * 400}GiB", "leaves nothing of the 24 GiB", "reserved=921MiB"),
        ("2xcpu reserved=1GiB", "`cpu` is none", "write `2xcpu`"),
        ("999999999xRTX 4090", "no machine has so many devices", "--hostfile FILE"),
        (f"{'9' * 5000}xcpu", "no machine has so many devices", "--hostfile FILE"),
        (("600xT4", "600xL4"), "no machine has so many devices", "1,000 at most"),
        ("RTX 3090 taken=1GiB", "`taken=1GiB` is no option", "reserved=921MiB"),
        ("0xT4", "`0xT4` names no device", "8xA800-80GB"),
        ("abacus", "no card is called `abacus`", "known cards: RTX 2060 6GB"),
        ((), "the list is empty", "[RTX 3090]"),
        (("RTX 3090", "cpu"), "cards and CPU ranks", "2xcpu"),
    ],
)
def test_mistakes_say_what_to_type(hardware, found, to_type):
    with pytest.raises(UsageError) as caught:
        resolve_cluster(hardware)
    assert caught.value.you_set.startswith("hardware: ")
    assert found in caught.value.found
    assert to_type in caught.value.to_type


def test_nproc_takes_the_first_cards_and_never_invents_one():
    assert [device.name for device in resolve_cluster(("T4", "L4", "L40S"), nproc=2).devices] == ["T4", "L4"]
    with pytest.raises(UsageError, match="has 2 cards") as caught:
        resolve_cluster("2xT4", nproc=3)
    assert caught.value.you_set == "--nproc 3"
    with pytest.raises(UsageError, match="no machine has so many"):
        resolve_cluster("cpu", nproc=10**9)


def test_cpu_ranks_share_the_host_memory(no_nvidia_smi):
    assert resolve_cluster("cpu").num_devices == 1
    cluster = resolve_cluster("2xcpu")
    assert (cluster.kind, cluster.num_devices) == ("cpu", 2)
    assert cluster.devices[0].memory_bytes == host_memory_bytes() // 2
    assert resolve_cluster("2xcpu", nproc=4).num_devices == 4


@pytest.mark.parametrize(("cores", "ranks"), [(1, 1), (2, 2), (64, 2)])
def test_auto_without_cards_is_at_most_two_cpu_ranks(no_nvidia_smi, monkeypatch, cores, ranks):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    cluster = resolve_cluster("auto")
    assert (cluster.kind, cluster.num_devices) == ("cpu", ranks)
    assert cluster.source == "this machine's CPU (there is no nvidia-smi)"
    assert this_machine(nproc=3).num_devices == 3


def test_auto_takes_what_nvidia_smi_shows(nvidia_smi):
    nvidia_smi(TWO_CARDS)
    cluster = resolve_cluster("auto")
    assert cluster.source == "nvidia-smi"
    first, second = cluster.devices
    assert (first.memory_bytes, first.reserved_bytes, first.bf16, first.uuid) == (
        8192 * MIB,
        921 * MIB,
        True,
        "GPU-aaaa1111",
    )
    assert (second.bf16, second.index) == (False, 1)
    assert [card_of(device) for device in cluster.devices] == [card("RTX 3060 Ti"), card("V100-32GB")]
    assert found_on_this_machine() == cluster
    assert resolve_cluster("auto", nproc=1).num_devices == 1
    with pytest.raises(UsageError, match="nvidia-smi has 2 cards"):
        resolve_cluster("auto", nproc=3)


@pytest.mark.parametrize(
    ("visible", "places"),
    [
        ("1", [1]), ("1,0", [1, 0]), ("GPU-bbbb", [1]), ("0,7,1", [0]), ("GPU-a,GPU-bb", [0, 1]), ("GPU-a,1", [0]),
        ("1,GPU-a", [1]), ("1a", [1]), ("+1", [1]), ("00", [0]), ("0 1", [0]), (" 1, 0", [1, 0]), ("0,-1,1", [0]),
        ("0,0", []), ("1,0,1", []), ("GPU-a,GPU-aaaa", []), ("GPU-", []), ("", []), ("-1", []), ("two", []), ("²", []),
    ],
)  # fmt: skip
def test_cuda_visible_devices_is_read_as_cuda_does(visible, places):
    """The cases of torch.cuda._parse_visible_devices and _transform_uuid_to_ordinals, which are CUDA's."""
    rows = [[str(number), uuid] for number, uuid in enumerate(("GPU-aaaa1111", "GPU-bbbb2222"))]
    assert visible_places(visible, rows) == places


def test_cuda_visible_devices_is_obeyed(nvidia_smi, monkeypatch):
    nvidia_smi(TWO_CARDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert [device.uuid for device in this_machine().devices] == ["GPU-bbbb2222", "GPU-aaaa1111"]
    assert [device.index for device in this_machine().devices] == [0, 1]


@pytest.mark.parametrize(
    ("visible", "why"),
    [
        ("", "hides all cards"), ("-1", "hides all cards"), ("1,1", "names a card twice, for which CUDA shows none"),
        ("GPU-cc", "begins with none of nvidia-smi's cards"),
        ("MIG-GPU-aaaa1111/1/0", "names a slice of a card, which nvidia-smi's list of cards does not have"),
    ],
)  # fmt: skip
def test_hidden_cards_leave_the_cpu_and_it_is_said_why(nvidia_smi, monkeypatch, visible, why):
    nvidia_smi(TWO_CARDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cluster = this_machine()
    assert (cluster.kind, cluster.source) == ("cpu", f"this machine's CPU (CUDA_VISIBLE_DEVICES={visible} {why})")


@pytest.mark.parametrize(
    ("answer", "code", "remark"),
    [
        (b"NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9,
         "nvidia-smi failed: NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."),
        (b"", 3, "nvidia-smi failed: exit code 3"),
        (b"", 0, "nvidia-smi shows no card"),
        (b"No devices were found", 0, "nvidia-smi answers 'No devices were found'"),
        (b"\xff\xfe", 0, "nvidia-smi answers '\ufffd\ufffd'"),
        (b"0, GPU-a, NVIDIA A100, [Insufficient Permissions], 0, 8.0", 0,
         "nvidia-smi says [Insufficient Permissions] for the memory of card 0, NVIDIA A100"),
    ],
    ids=["driver", "silent", "none", "words", "bytes", "memory"],
)  # fmt: skip
def test_what_nvidia_smi_says_instead_of_cards_is_in_the_source(nvidia_smi, answer, code, remark):
    nvidia_smi(answer, code)
    cluster = this_machine()
    assert (cluster.kind, cluster.source) == ("cpu", f"this machine's CPU ({remark})")


def test_memory_that_is_not_given_is_the_hosts(nvidia_smi):
    nvidia_smi("0, GPU-cccc, NVIDIA GB10, [N/A], [N/A], 12.1\n")
    (device,) = this_machine().devices
    assert (device.memory_bytes, device.reserved_bytes, device.bf16) == (host_memory_bytes(), 0, True)
    assert card_of(device) is None


@pytest.mark.parametrize(
    ("group", "file", "limit", "expected"),
    [
        ("0::/job/step", "job/memory.max", "3000000", 3000000),
        ("0::/job/step", "job/memory.max", "max", 8000 * 1024),
        ("5:memory:/job", "memory/job/memory.limit_in_bytes", "2000000", 2000000),
        ("5:memory:/job", "memory/job/memory.limit_in_bytes", "9223372036854771712", 8000 * 1024),
        ("5:cpu:/job", "memory/job/memory.limit_in_bytes", "2000000", 8000 * 1024),
    ],
)
def test_the_containers_limit_counts_where_it_is_smaller(tmp_path: Path, group, file, limit, expected):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:           8000 kB\nMemFree: 1 kB\n")
    (proc / "self" / "cgroup").write_text(group + "\n")
    (cgroup / file).parent.mkdir(parents=True)
    (cgroup / file).write_text(limit)
    assert host_memory_bytes(proc, cgroup) == expected


def test_the_table_is_whole():
    cards = [card(name) for name in card_names()]
    assert len(cards) == 52
    for known in cards:
        assert resolve_cluster(known.name).devices[0].name == known.name
        # Volta and Turing have no bf16; the rate with fp32 accumulation is one for both types.
        assert known.bf16 == (known.fp16 if float(known.capability) >= 8 else None)
        assert known.source


def test_devices_in_words():
    assert resolve_cluster("8xA800-80GB").named == "8 × A800-80GB"
    assert resolve_cluster(("T4", "2xL4", "T4")).named == "2 × T4 + 2 × L4"
    assert resolve_cluster(("RTX 3060 Ti", "RTX 3060 12GB")).named == "RTX 3060 Ti + RTX 3060 12GB"
    node = resolve_cluster(("4xRTX 3090", "4xT4")).nodes[0]
    assert Cluster(nodes=(node,) * 1000, source="").named == "4,000 × RTX 3090 + 4,000 × T4 on 1,000 hosts"


def test_a_cluster_survives_json():
    cluster = resolve_cluster(("RTX 3060 Ti reserved=1GB", "2xL4"))
    assert Cluster.model_validate_json(cluster.model_dump_json()) == cluster
