"""Who failed first and why, from the files of a run directory.

Reads only what ranks and supervisor wrote; asks no process and no device.
"""

from __future__ import annotations

import re
import shutil
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.causes import killed, lost_connection, reason_of
from launcher.plan import Plan
from launcher.rundir import RunDir, read_json

# What the other ranks say when one has gone: true of them, but not the cause.
_ECHO_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
_ECHO_TEXT = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Socket Timeout|gloo/transport|NCCL|Timed out waiting|store->get"
)
_SIGNALS = {
    signal.SIGKILL: "killed (SIGKILL): by somebody, or by the kernel because host memory was full",
    signal.SIGTERM: "ended (SIGTERM): by somebody, or by the scheduler of this machine",
    signal.SIGSEGV: "crashed (SIGSEGV): a fault in native code",
    signal.SIGABRT: "aborted (SIGABRT): native code gave up",
    signal.SIGBUS: "crashed (SIGBUS): shared memory or a mapped file ran out",
}
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|PytorchStreamWriter|inline_container")
# Below this nobody can write even a message about it.
_FULL_BYTES = 64 * 2**10
_PYTHON_ERROR = re.compile(r"[\w.]*(Error|Exception): \S")
_LAST_LINES = 20


@dataclass(frozen=True)
class Failure:
    """The first rank that failed, and what it says.

    Args:
        rank: global rank; None when the ranks never started.
        cause: one line, the type and message of the true exception, or how it was killed.
        where: `file:line in function` of the innermost frame of ours and of the innermost of all.
        traceback: the whole of it, empty for a killed rank.
        exit_code: 128 + signal for a killed rank.
        parts: you_set, found, to_type of an error of the person's, else empty.
        echoes: ranks that failed after it, because of it.
        waits: where each rank was, of a run that stood still.
        remedy: what to type, where something is known of the cause.
        notes: what was measured and planned about it.
        memory: bytes of the host (rss, available) and of its card, when it was last seen.
        last_lines: of its log.
    """

    rank: int | None
    host: str
    device: str
    step: int
    phase: str
    time: float
    cause: str
    where: str
    traceback: str
    exit_code: int
    log: str
    parts: dict[str, str]
    echoes: tuple[int, ...]
    waits: tuple[str, ...] = ()
    remedy: str = ""
    notes: tuple[str, ...] = ()
    memory: dict[str, int] = field(default_factory=dict)
    last_lines: tuple[str, ...] = ()


def first_failure(run: RunDir, plan: Plan, node_exit_code: int) -> Failure:
    """Who failed first. Call it for a run whose node command ended with a code other than 0, or that stood still."""
    stall = read_json(run.stall)
    if stall:
        return _stalled(run, plan, stall, node_exit_code)
    errors = {int(path.stem): read_json(path) for path in run.errors.glob("[0-9]*.json")}
    errors = {rank: error for rank, error in errors.items() if error}
    nodes = [read_json(path) or {} for path in run.errors.glob("node*.json")]
    ended = {int(rank): int(end["exit_code"]) for node in nodes for rank, end in (node.get("ranks") or {}).items()}
    if not ended and plan.backend == "python" and read_json(run.heartbeat(0)):
        ended = {0: node_exit_code}  # a single process without torchrun above it
    causes = {rank: error for rank, error in errors.items() if not _is_echo(error)}
    lost = next((node for node in nodes if "lost" in node), None)
    if lost is not None and not causes:
        cause = f"the connection to {lost['host']} is lost: {lost['lost']}"
        return replace(_no_rank(run, plan, node_exit_code), host=lost["host"], time=lost["time"], cause=cause)
    silent = _silent(run, ended, errors, causes)
    if silent:
        rank = min(silent, key=lambda r: _last_beat(run, r).get("time", 0.0))
        return _without_a_word(run, plan, rank, silent[rank], errors, _others(rank, errors, ended))
    chosen = causes or errors
    if chosen:
        rank = min(chosen, key=lambda r: chosen[r]["time"])
        return _raised(run, plan, rank, chosen[rank], _others(rank, errors, ended))
    return _no_rank(run, plan, node_exit_code)


def _silent(
    run: RunDir, ended: dict[int, int], errors: dict[int, Any], causes: dict[int, dict[str, Any]]
) -> dict[int, int]:
    """Exit codes of the ranks that ended without a word and may be the first: killed, crashed, or gone by os._exit."""
    silent = {rank: code for rank, code in ended.items() if code and rank not in errors}
    # torchrun ends the ranks that are left by SIGTERM, and libraries abort when a peer is gone.
    echoes = (-signal.SIGTERM, -signal.SIGABRT) if causes else (-signal.SIGTERM,)
    first = {rank: code for rank, code in silent.items() if code not in echoes}
    if not first and not causes:
        first = silent
    # Who was seen alive after another one had given its reason did not fail first.
    return {
        rank: code
        for rank, code in first.items()
        if not any(error["time"] < _last_beat(run, rank).get("time", 0.0) for error in causes.values())
    }


def _is_echo(error: dict[str, Any]) -> bool:
    return error["type"].rpartition(".")[2] in _ECHO_TYPES or bool(_ECHO_TEXT.search(error["message"]))


def _others(rank: int, errors: dict[int, Any], ended: dict[int, Any]) -> tuple[int, ...]:
    return tuple(sorted((set(errors) | set(ended)) - {rank}))


def _last_beat(run: RunDir, rank: int) -> dict[str, Any]:
    return read_json(run.heartbeat(rank)) or {}


def _raised(run: RunDir, plan: Plan, rank: int, error: dict[str, Any], echoes: tuple[int, ...]) -> Failure:
    kind = error["type"].rpartition(".")[2]
    message = (error["message"].strip().splitlines() or [""])[0]
    parts: dict[str, str] = {key: error[key] for key in ("you_set", "found", "to_type") if key in error}
    if not parts and _DISK_FULL.search(error["message"]):
        parts = _disk_full(run, error["phase"])
    reason = None if parts else reason_of(error, plan)
    if reason is None and not parts and _is_echo(error):
        reason = lost_connection(error["message"])
    said = f"{error['type'] if kind == 'OutOfMemoryError' else kind}: {message}"
    cause = f"{parts['you_set']}: {parts['found']}" if parts else said
    known = (reason.found, *reason.notes) if reason else ()
    log = run.rank_log(error["host"], rank)
    return Failure(
        rank=rank,
        host=error["host"],
        device=error["device"],
        step=error["step"],
        phase=error["phase"],
        time=error["time"],
        cause=cause,
        where=_where(error["traceback"]),
        traceback=error["traceback"],
        exit_code=error["exit_code"],
        log=str(log),
        parts=parts,
        echoes=echoes,
        remedy=reason.to_type if reason else "",
        notes=tuple(filter(None, known)),
        memory=error.get("memory", {}),
        last_lines=tuple(last_lines(log)),
    )


def _stalled(run: RunDir, plan: Plan, stall: dict[str, Any], exit_code: int) -> Failure:
    rank, host = int(stall["rank"]), stall["host"] or plan.cluster.nodes[0].host
    log = run.rank_log(host, rank)
    return Failure(
        rank=rank,
        host=host,
        device=plan.cluster.devices[plan.device_of(rank)].name,
        step=stall["step"],
        phase=stall["phase"],
        time=stall["time"],
        cause=stall["cause"],
        where=_where(stall["traceback"]),
        traceback=stall["traceback"],
        exit_code=exit_code,
        log=str(log if log.is_file() else run.node_log(plan.cluster.nodes[0].host)),
        parts={"you_set": "", "found": stall["cause"], "to_type": stall["to_type"]},
        echoes=(),
        waits=tuple(stall["waits"]),
    )


def _without_a_word(
    run: RunDir, plan: Plan, rank: int, code: int, errors: dict[int, Any], echoes: tuple[int, ...]
) -> Failure:
    beat = _last_beat(run, rank)
    host, phase = beat.get("host", plan.cluster.nodes[0].host), beat.get("phase", "start")
    # Ranks keep step, and the others wrote theirs down when they failed; this one's last beat may be half a second old.
    steps = [beat.get("step", 0), *(error["step"] for error in errors.values() if phase == error["phase"])]
    log = run.rank_log(host, rank)
    if not log.is_file():  # it did not come so far as to open its own
        log = run.node_log(plan.cluster.nodes[0].host)
    devices = plan.cluster.devices
    parts = _disk_full(run, phase) if _is_full(run) else {}
    reason = (
        killed((read_json(run.oom_kills(host)) or {}).get("kills"), beat, plan) if code == -signal.SIGKILL else None
    )
    return Failure(
        rank=rank,
        host=host,
        device=devices[plan.device_of(rank)].name,
        step=max(steps),
        phase=phase,
        time=beat.get("time", 0.0),
        cause=f"{parts['you_set']}: {parts['found']}" if parts else reason.found if reason else _ending(code, log),
        where="",
        traceback="",
        exit_code=_exit_code(code),
        log=str(log),
        parts=parts,
        echoes=echoes,
        remedy=reason.to_type if reason and not parts else "",
        notes=reason.notes if reason else (),
        memory=beat.get("memory", {}),
        last_lines=tuple(last_lines(log)),
    )


def _no_rank(run: RunDir, plan: Plan, code: int) -> Failure:
    """The ranks did not come to life, or what had started them was killed and took them with it."""
    host = plan.cluster.nodes[0].host
    log = run.node_log(host)
    beats = [_last_beat(run, rank) for rank in range(plan.num_processes)]
    last = max(beats, key=lambda beat: float(beat.get("time", 0.0)))
    parts = _disk_full(run, last.get("phase", "start")) if _is_full(run) else {}
    return Failure(
        rank=None,
        host=host,
        device="",
        step=last.get("step", 0),
        phase=last.get("phase", "start"),
        time=last.get("time", 0.0),
        cause=f"{parts['you_set']}: {parts['found']}" if parts else f"{plan.backend} {_ending(code, log)}",
        where="",
        traceback="",
        exit_code=_exit_code(code),
        log=str(log),
        parts=parts,
        echoes=(),
    )


def _ending(code: int, log: Path) -> str:
    """How a process ended that left no reason: its signal, or its exit code and the last error in its log."""
    if code < 0:
        known = _SIGNALS.get(signal.Signals(-code))
        return known or f"killed by {signal.Signals(-code).name}"
    said = [line.strip() for line in last_lines(log) if _PYTHON_ERROR.search(line)]
    return f"ended with exit code {code}{f': {said[-1]}' if said else ' and gave no reason'}"


def _exit_code(code: int) -> int:
    """A code as a shell gives it: 128 + signal for what was killed."""
    return code if code > 0 else 128 - code


def _is_full(run: RunDir) -> bool:
    """Whether the reason may be missing because nobody could write it down."""
    return shutil.disk_usage(run.path).free < _FULL_BYTES


def _disk_full(run: RunDir, phase: str) -> dict[str, str]:
    return {
        "you_set": f"run directory {run.path}",
        "found": f"no space left on the device (at: {phase})",
        "to_type": "make room there, then: launch resume RUN",
    }


def _where(traceback: str) -> str:
    """`worker/training.py:188 in training_step → modeling_llama.py:512 in forward`, from a traceback's text."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', traceback)
    if not frames:
        return ""
    ours = [frame for frame in frames if "/launcher/" in frame[0]]
    chosen = [ours[-1], frames[-1]] if ours and ours[-1] != frames[-1] else [frames[-1]]
    return " → ".join(f"{'/'.join(Path(file).parts[-2:])}:{line} in {function}" for file, line, function in chosen)


def last_lines(path: Path, num: int = _LAST_LINES) -> list[str]:
    """The last lines of a log, none where there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 200 * num))
            return file.read().decode(errors="replace").splitlines()[-num:]
    except OSError:
        return []
