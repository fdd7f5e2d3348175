"""Before torch starts on several nodes: whether each is reached and has what the run needs, and where they all meet.

Everything that is wrong, on whatever node, is said at once, each with what to type.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import launcher
from launcher.agent import code_hash
from launcher.cluster import Device, is_here, same_card
from launcher.command import Rendezvous
from launcher.errors import PreflightError
from launcher.installed import version_of
from launcher.nodes import Connection, SeveralNodes, all_of
from launcher.plan import Plan
from launcher.preflight.finding import size
from launcher.report import last_lines
from launcher.rundir import write_atomic, write_json
from launcher.sending import why_not_copied

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
# Python's start and the hash of the code, from a slow shared disk.
_LOOK_SECONDS = 60.0
_REACH_SECONDS = 15.0
_CLOCKS_APART_SECONDS = 2.0
# What ssh says, and what helps.
_SSH = {
    "Host key verification failed": "say once that you know it: ssh {host}",
    "Permission denied": "let your key in there: ssh-copy-id {host}; or name one: launch.ssh.key=FILE, launch.ssh.user=NAME",
    "Could not resolve hostname": "mend the name in the hostfile, or give it an address in ~/.ssh/config or /etc/hosts",
    "Connection refused": "start sshd there, or name its port: launch.ssh.port=N",
    "timed out": "see whether it is up and no firewall lies between: ssh {host}; or wait longer: launch.ssh.timeout_s=60",
    "No route to host": "see whether it is up and on this network: ssh {host}",
    "No such file": "name the Python there that has this launcher: launch.ssh.python=/path/to/python",
    "not found": "name the Python there that has this launcher: launch.ssh.python=/path/to/python",
    "No module named": "install the launcher there, the version that is here; or name its Python: launch.ssh.python=/path/to/python",
}


def handshake(nodes: SeveralNodes, tell: Callable[[dict[str, Any]], None]) -> None:
    """Connect, compare, and agree on where the nodes meet, which is left in `nodes.rendezvous`.

    Raises:
        PreflightError: a node is not reached, or not as this one.
    """
    run, plan = nodes.run, nodes.plan
    for stale in run.path.glob("prepared-node*.json"):
        stale.unlink()
    write_atomic(run.word, nodes.word)
    nodes.connect()
    look = {
        "do": "look",
        "run": str(run.path.absolute()),
        "word": nodes.word,
        "kind": plan.kind,
        "cwd": str(Path.cwd()),
        "paths": _needed(plan),
        "packages": _packages(plan),
    }
    firsts = [0, *accumulate(len(one.node.devices) for one in nodes.connections)]
    asked = {
        one.rank: {**look, "rank": one.rank, "ranks": firsts[one.rank : one.rank + 2]} for one in nodes.connections
    }
    looked = nodes.ask("looked", plan.recipe.launch.ssh.timeout_s + _LOOK_SECONDS, asked)
    own: dict[str, Any] = {"python": platform.python_version(), "launcher": launcher.__version__, "code": code_hash()}
    own["packages"] = {name: version_of(name) or "none" for name in _packages(plan)}
    problems = [
        problem
        for one in nodes.connections
        for problem in (_compared(nodes, one, looked[one.rank], own) if one.rank in looked else _unreached(one))
    ]
    for word in (run.word, *(run.word_of(one.rank) for one in nodes.connections)):
        word.unlink(missing_ok=True)
    if problems:
        raise all_of(problems)
    if nodes.copies:
        write_json(run.mirrored, {"nodes": sorted(nodes.copies)})
    reached = _meet(nodes, looked)
    rows = [
        {**_row(one, looked[one.rank], reached[one.rank]), "has_copy": one.rank in nodes.copies}
        for one in nodes.connections
    ]
    tell({"event": "nodes", "nodes": rows})


def _data(plan: Plan) -> list[str]:
    """Paths of the recipe's rows; what a stream reads from elsewhere is for each node to reach."""
    data = plan.recipe.data
    named = [data.path, data.eval.path if data.eval else None]
    paths = [path for one in named if one for path in ([one] if isinstance(one, str) else one)]
    return [path for path in paths if "://" not in path]


def _needed(plan: Plan) -> list[str]:
    """Paths of the recipe that every node reads; what is on a hub is fetched by each."""
    folders = (plan.recipe.model.path, plan.recipe.checkpoint.init_from)
    return [*_data(plan), *(path for path in folders if path is not None and Path(path).exists())]


def _packages(plan: Plan) -> list[str]:
    return [*_PACKAGES, *(["deepspeed"] if plan.deepspeed is not None or plan.backend == "deepspeed" else [])]


def _unreached(one: Connection) -> Iterator[PreflightError]:
    """Why a node did not answer, from the last thing that ssh or its shell said."""
    host = one.node.host
    said = [line.strip() for line in last_lines(one.log, 5) if line.strip()]
    if not one.lost:
        yield PreflightError(
            one.name, f"does not answer; it said: {said[-1] if said else 'nothing'}", f"try: ssh {host}"
        )
        return
    words = next((line for line in reversed(said) if any(text in line for text in _SSH)), said[-1] if said else "")
    to_type = next((remedy for text, remedy in _SSH.items() if text in words), f"see {one.log}")
    yield PreflightError(one.name, words or one.lost, to_type.format(host=host))


def _compared(
    nodes: SeveralNodes, one: Connection, found: dict[str, Any], own: dict[str, Any]
) -> Iterator[PreflightError]:
    """What of a node is not as here."""
    python = own["python"].rpartition(".")[0]
    if found["python"].rpartition(".")[0] != python:
        to_type = f"name a Python {python} there: launch.ssh.python=/path/to/python"
        yield PreflightError(one.name, f"has Python {found['python']}, here is {own['python']}", to_type)
    if found["code"] != own["code"]:
        same = "install there what is here"
        there = f"version {found['launcher']}" if found["launcher"] != own["launcher"] else "the same version, changed"
        yield PreflightError(one.name, f"has another launcher: {there} (here {own['launcher']})", same)
    other = [name for name, here in own["packages"].items() if found["packages"][name] != here]
    if other:
        pairs = ", ".join(f"{name} {found['packages'][name]} (here {own['packages'][name]})" for name in other)
        wanted = " ".join(f"{name}=={own['packages'][name]}" for name in other)
        yield PreflightError(one.name, f"has {pairs}", f"there: pip install {wanted}")
    data = _data(nodes.plan)
    if found["shared"] or not nodes.run.word_of(one.rank).exists():
        to_type = "name one on a file system that all nodes share: launch.run_dir=DIR"
        problem = _no_copy(nodes.plan, one.rank, found)
        if problem:
            yield PreflightError(f"{one.name}: run directory {nodes.run.path.absolute()}", problem, to_type)
        else:
            nodes.copies[one.rank] = any(path in data for path in found["missing"])
    for path in found["missing"]:
        if one.rank in nodes.copies and path in data:
            continue  # it gets the prepared rows
        yield PreflightError(
            f"{one.name}: {path}", "is not there", "copy it there, to the same path, or share its folder"
        )
    if nodes.plan.kind == "cuda":
        before = sum(len(node.devices) for node in nodes.plan.cluster.nodes[: one.rank])
        needs = [nodes.plan.bytes_of(before + place) for place in range(len(one.node.devices))]
        yield from _other_cards(one, needs, [Device.model_validate(device) for device in found["devices"]])


def _no_copy(plan: Plan, rank: int, found: dict[str, Any]) -> str:
    """Why a node that does not see the run directory cannot be given a copy of it; empty where it can."""
    if not found["shared"]:
        return "what is written there does not arrive here"
    reason = found["occupied"] or why_not_copied(plan, rank)
    return f"{found['shared']}; and there can be no copy of it: {reason}" if reason else ""


def _other_cards(one: Connection, needs: list[int], there: list[Device]) -> Iterator[PreflightError]:
    """Fewer cards, others, or fuller ones than planned; so many bytes are needed on each."""
    wanted = max(device.index for device in one.node.devices) + 1
    if len(there) < wanted:
        name = one.node.host
        to_type = f"write: {name} slots={len(there)}" if there else f"leave it out: --exclude {name}"
        yield PreflightError(one.name, f"has {len(there)} cards, slot {wanted - 1} is to be used", to_type)
        return
    for planned, needed in zip(one.node.devices, needs, strict=True):
        if not same_card(planned, there[planned.index]):
            found = f"card {planned.index} is {there[planned.index].name}, planned is {planned.name}"
            yield PreflightError(one.name, found, "name what is there in `hardware`, or leave it out: --exclude")
        elif (free := there[planned.index].memory_bytes - there[planned.index].reserved_bytes) < needed:
            found = f"card {planned.index} has {size(free)} free, {size(needed)} are planned"
            yield PreflightError(one.name, found, "end what uses it (there: nvidia-smi), or leave it out: --exclude")


def _meet(nodes: SeveralNodes, looked: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Find the address of the first node that all reach at its port.

    Raises:
        PreflightError: there is none, or the port is taken.
    """
    wanted = nodes.plan.recipe.launch.port or 0
    (listening,) = nodes.ask("listening", _REACH_SECONDS, {0: {"do": "listen", "port": wanted}}).values()
    first = nodes.connections[0].node.host
    if listening.get("error"):
        found = f"cannot be taken on {first}: {listening['error']}"
        raise PreflightError(f"launch.port: {wanted}", found, "take a free one: launch.port=null")
    port, tried, own = listening["port"], [], listening["interfaces"]
    for address in _addresses(nodes, looked, own):
        reach = {"do": "reach", "address": address, "port": port, "word": nodes.word}
        reached = nodes.ask("reached", _REACH_SECONDS, {one.rank: reach for one in nodes.connections[1:]})
        reached[0] = {"own": address, "interface": own.get(address)}
        refused = [one for one in nodes.connections if not reached.get(one.rank, {}).get("interface")]
        if not refused:
            interfaces = tuple(reached[one.rank]["interface"] for one in nodes.connections)
            nodes.rendezvous = Rendezvous(address, port, interfaces)
            return reached
        problem = reached.get(refused[0].rank, {}).get("problem", "no answer")
        tried.append(f"{refused[0].node.host} → {address}: {problem}")
    found = f"not every node reaches it: {'; '.join(tried)}"
    to_type = "open a port between the nodes and name it: launch.port=29500"
    raise PreflightError(f"port {port} of {first}", found, to_type)


def _addresses(nodes: SeveralNodes, looked: dict[int, dict[str, Any]], own: dict[str, str]) -> list[str]:
    """Addresses of the first node, likeliest first: as ssh connections show it, then those of its interfaces; no name is looked up.

    Args:
        own: address -> interface.
    """
    seen = {rank: found["connection"].split() for rank, found in looked.items() if found["connection"]}
    if is_here(nodes.connections[0].node.host):
        shown = [words[0] for rank, words in seen.items() if rank]  # who has come to the others
    else:
        shown = [words[2] for rank, words in seen.items() if rank == 0]
    # A link-local address is one beside the name of an interface, which no other host knows.
    outside = [address for address in (*shown, *own) if not address.startswith(("127.", "fe80:")) and address != "::1"]
    return list(dict.fromkeys([*outside, *shown, "127.0.0.1"]))


def _row(one: Connection, found: dict[str, Any], reached: dict[str, Any]) -> dict[str, Any]:
    """What the screen shows of a node."""
    ahead = found["clock"] - found["heard"]
    return {
        "host": one.node.host,
        "slots": len(one.node.devices),
        "device": one.node.devices[0].name,
        "interface": reached["interface"],
        "address": reached["own"],
        "torch": found["packages"]["torch"],
        "clock": round(ahead, 2),
        "clock_is_off": abs(ahead) > _CLOCKS_APART_SECONDS,
    }
