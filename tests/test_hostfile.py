"""A hostfile in DeepSpeed's format -> the nodes of a cluster; every mistake with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cluster import resolve_cluster
from launcher.errors import LaunchError


def hostfile(folder: Path, text: str) -> str:
    path = folder / "hosts"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_host_has_so_many_of_the_devices(tmp_path: Path) -> None:
    file = hostfile(tmp_path, "# two\n\nnode-a slots=8   # big\nuser@10.0.0.2 slots=3\n[fe80::1] slots=1\n")
    cluster = resolve_cluster("8xA800-80GB", hostfile=file)
    assert [(node.host, len(node.devices)) for node in cluster.nodes] == [
        ("node-a", 8),
        ("user@10.0.0.2", 3),
        ("[fe80::1]", 1),
    ]
    assert cluster.num_devices == 12
    assert cluster.source == f"hardware: 8xA800-80GB, on the hosts of {file}"


def test_the_shipped_one_is_read() -> None:
    path = Path(__file__).parent.parent / "hostfiles" / "2x8a800"
    assert resolve_cluster("8xA800-80GB", hostfile=str(path)).num_devices == 16


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "there is no host in it"),
        ("# nothing\n", "there is no host in it"),
        ("a slots=2\nb\n", "hosts:2:1  hostfile: expected `slots=NUMBER` after b, found 'nothing'. Write: b slots=8"),
        ("a slot=2\n", "found 'slot=2'"),
        ("a slots=two\n", "found 'slots=two'"),
        ("a slots=0\n", "a has no slots"),
        ("a slots=2 gpus=3\n", "found 'slots=2 gpus=3'"),
        ("a slots=2\nb slots=2\na slots=1\n", "hosts:1 already"),
        ("-oProxyCommand=x slots=2\n", "is no host name"),
        ("a;reboot slots=2\n", "is no host name"),
        ("$(x) slots=2\n", "is no host name"),
        ("a slots=9\n", "a has 9 slots, hardware: 8xA800-80GB has 8 devices"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(LaunchError) as caught:
        resolve_cluster("8xA800-80GB", hostfile=hostfile(tmp_path, text))
    assert caught.value.exit_code == 2
    assert found in str(caught.value)


def test_all_bad_lines_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        resolve_cluster("8xA800-80GB", hostfile=hostfile(tmp_path, "a\nb slots=1\nc;d slots=2\n"))
    assert str(caught.value).count("hosts:") == 2


def test_a_missing_file_and_nproc_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="No such file"):
        resolve_cluster("8xA800-80GB", hostfile=str(tmp_path / "none"))
    with pytest.raises(LaunchError, match="leave --nproc out"):
        resolve_cluster("8xA800-80GB", nproc=2, hostfile=hostfile(tmp_path, "a slots=1\n"))


HOSTS = "node-a slots=4\nuser@node-b slots=2\nfe80::1 slots=2\n"


@pytest.mark.parametrize(
    ("flag", "text", "left"),
    [
        ("include", "node-a", {"node-a": (0, 1, 2, 3)}),
        ("include", "user@node-b@node-a:0,2", {"node-a": (0, 2), "user@node-b": (0, 1)}),
        ("include", "fe80::1:1@node-a:3", {"node-a": (3,), "fe80::1": (1,)}),
        ("include", "node-a:1@node-a:0,1", {"node-a": (0, 1)}),
        ("exclude", "node-a:0,2", {"node-a": (1, 3), "user@node-b": (0, 1), "fe80::1": (0, 1)}),
        ("exclude", "node-a user@node-b", {"fe80::1": (0, 1)}),
    ],
)
def test_hosts_and_slots_are_chosen_in_deepspeeds_words(
    tmp_path: Path, flag: str, text: str, left: dict[str, tuple[int, ...]]
) -> None:
    cluster = resolve_cluster("8xA800-80GB", hostfile=hostfile(tmp_path, HOSTS), **{flag: text})
    assert {node.host: tuple(device.index for device in node.devices) for node in cluster.nodes} == left
    assert cluster.nodes[0].where.startswith(f"{tmp_path / 'hosts'}:")


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({"include": "node-c"}, "is not made of hosts of the hostfile: node-a, user@node-b, fe80::1"),
        ({"include": "node-a:0-2"}, "is not made of hosts"),
        ({"include": "node-a:4"}, "there is no slot 4: node-a has slots 0 to 3"),
        ({"exclude": "node-a@user@node-b@fe80::1"}, "no slot of any host is left"),
        ({"include": "node-a", "exclude": "node-a"}, "leave one of them out"),
    ],
)
def test_what_cannot_be_chosen_is_said(tmp_path: Path, flags: dict[str, str], found: str) -> None:
    with pytest.raises(LaunchError) as caught:
        resolve_cluster("8xA800-80GB", hostfile=hostfile(tmp_path, HOSTS), **flags)
    assert caught.value.exit_code == 2
    assert found in str(caught.value)


def test_a_choice_wants_a_hostfile() -> None:
    with pytest.raises(LaunchError, match="add --hostfile FILE"):
        resolve_cluster("8xA800-80GB", include="node-a")
