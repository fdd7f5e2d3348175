"""Every mistake a person can make: its exit code, what was set, what was found, what to type. Never a traceback.

`main` runs in this process; what it starts (prepare, ranks, chat) is real.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from launcher import manifest
from launcher.cli import main
from launcher.rundir import RunDir, read_json
from tests.e2e.conftest import Launcher, report_of

Refused = Callable[..., str]
USAGE, DOES_NOT_FIT, NOT_READY = 2, 3, 4


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch_env: dict[str, str], recipe: Path) -> Path:
    """Where the person stands: an empty folder with a recipe, tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    for name in ("LAUNCH_CACHE", "HF_HOME", "HF_ENDPOINT"):
        monkeypatch.setenv(name, launch_env[name])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("COLUMNS", "400")
    shutil.copyfile(recipe, "tiny.yaml")
    return tmp_path


@pytest.fixture
def refused(here: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """`refused(code, words, "run", "tiny.yaml", …)`: it ends with that code, says all of the words, and shows no traceback."""

    def check(exit_code: int, words: list[str], *args: str | Path) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        assert ended.value.code == exit_code, out + err
        for word in words:
            assert word in err, f"{word!r} is not in:\n{err}"
        return err

    return check


@pytest.fixture
def finished(finished_run: Path, here: Path) -> Path:
    """A copy of a run that is done."""
    return Path(shutil.copytree(finished_run, "finished", symlinks=True))


@pytest.fixture
def model(finished_run: Path, here: Path) -> Path:
    """A model folder to break."""
    return Path(shutil.copytree(read_json(RunDir(finished_run).prepared)["model_dir"], "model"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("8m")`: a file system of that size."""
    mounted: list[Path] = []

    def mount(size: str, *options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "none", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small file system can only be mounted by root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# --- the command line and the recipe


@pytest.mark.parametrize(
    ("exit_code", "args", "words"),
    [
        (USAGE, "plan", ["no recipe: there is nothing to plan", "launch recipes"]),
        (USAGE, "nonsense", ["recipe nonsense: there is no such recipe", "launch recipes"]),
        (USAGE, "quickstrat", ["did you mean: launch ", "recipes/quickstart.yaml"]),
        (USAGE, "run nowhere/mine.yaml", ["recipe nowhere/mine.yaml: there is no such recipe", "launch recipes"]),
        (USAGE, "run .", ["recipe .: is a folder"]),
        (USAGE, "tiny.yaml --frobnicate", ["No such option '--frobnicate'"]),
        (USAGE, "tiny.yaml train.lr", ["train.lr: is neither a flag nor an override", "train.lr=2e-4"]),
        (USAGE, "tiny.yaml train.learning_rate=1", ["train.learning_rate: unknown key. Did you mean train.lr?"]),
        (USAGE, "tiny.yaml train.lr=fast", ["train.lr: expected a number, found 'fast'"]),
        (USAGE, "tiny.yaml data.template=mine", ["there is no template 'mine'. There are: auto, chat"]),
        (USAGE, "tiny.yaml --nproc 99", ["train.global_batch: 4 is no multiple of 99 ranks", "Nearest that are: 99"]),
        (
            USAGE,
            "tiny.yaml hardware=2xA800-80GB --nproc 3",
            ["--nproc 3: hardware: 2xA800-80GB has 2 cards", "--nproc 2"],
        ),
        (USAGE, "tiny.yaml hardware=2xA8000", ["no card is called `A8000`", "did you mean `A800-80GB`"]),
        (
            USAGE,
            "tiny.yaml adapter.modules_to_save=[lm_headd]",
            ["adapter.modules_to_save: lm_headd match nothing in llama. It has: ", "lm_head"],
        ),
        (USAGE, "plan tiny.yaml model.config.num_hidden_layers=99999999999999", ["has 99999999999999 layers"]),
        (USAGE, f"plan {'a' * 5000}", ["there is no such recipe"]),
        (USAGE, f"resume {'a' * 5000}", ["there is no such folder"]),
        (USAGE, "chat nowhere", ["run nowhere: there is no such folder", "launch runs"]),
        (USAGE, "export tiny.yaml", ["run tiny.yaml: there is no such folder", "launch runs"]),
        (USAGE, "resume .", ["run .: holds no plan.json", "launch runs"]),
        (USAGE, "export . --max-shard-size big", ["'big' is no size. Write it as 500MB or 2GB"]),
        (USAGE, "chat . --max-new-tokens 0", ["--max-new-tokens", "0 is not in the range"]),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_a_command_line_that_cannot_be_carried_out(
    exit_code: int, args: str, words: list[str], refused: Refused
) -> None:
    refused(exit_code, words, *args.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"model: {path: x\ndata:\n  path: [a", ["broken.yaml:2:5  is no valid YAML", "1 error, nothing was started"]),
        (b"", ["broken.yaml:1:1  is empty; a recipe is a mapping"]),
        (b"\xff\xfe\x00", ["broken.yaml: cannot be read", "UTF-8"]),
        (
            b"model: {path: x}\ndata: {path: y, format: alpacca}\ntrain:\n  batch_size: 3\n",
            [
                "broken.yaml:2:17  data.format: ",
                "Did you mean alpaca?",
                "broken.yaml:4:3  train.batch_size: unknown key",
            ],
        ),
    ],
    ids=["torn", "empty", "binary", "two mistakes"],
)
def test_a_recipe_with_mistakes(text: bytes, words: list[str], refused: Refused) -> None:
    Path("broken.yaml").write_bytes(text)
    refused(USAGE, words, "broken.yaml")


def test_a_model_that_does_not_fit(refused: Refused) -> None:
    told = refused(
        DOES_NOT_FIT,
        ["GiB needed on a device with", "(RTX 3060 12GB)", "largest part: weights"],
        "tiny.yaml",
        "model={path: meta-llama/Llama-2-7b-hf, dtype: fp16}",
        "hardware=RTX 3060 12GB",
    )
    assert "model.quantization=nf4" in told, "what does fit is named"


# --- data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere.json", None, ["there is no such file or folder", "data.path=FILE"]),
        ("empty.json", b"", ["holds no rows", "check data.path and data.format"]),
        ("empty-array.json", b"[]", ["holds no rows"]),
        (
            "bad.json",
            b'[{"instruction": "a", "output": "b"},\n {"instruction": "a"},\n {"instruction": "a", "output": ""},\n 7]',
            [
                "3 bad rows",
                "bad.json:2  field 'output' is missing; it has 'instruction'",
                "bad.json:3  field 'output' is empty",
                "bad.json:4  is of type int, not an object",
                "data.bad_rows=skip",
            ],
        ),
        ("torn.jsonl", b'{"instruction": "a", "output": "b"}\n{"instru\n', ["torn.jsonl:2  is no valid JSON"]),
        ("gb.json", '[{"instruction": "你好", "output": "b"}]'.encode("gb18030"), ["is not UTF-8", "iconv -f GB18030"]),
        ("broken.parquet", b"PAR1 and nothing else", ["is no valid Parquet"]),
        ("folder/notes.md", b"#", ["the folder holds no data file"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_data_that_cannot_be_read(
    name: str, content: bytes | None, words: list[str], here: Path, refused: Refused
) -> None:
    path = here / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    path = path.parent if path.suffix == ".md" else path
    refused(NOT_READY, [f"error: data.path: {path}: ", *words], "tiny.yaml", f"data.path={path}", "--run-dir", "run")
    report = read_json(here / "run" / "report.json")
    assert content is None or (report["result"], report["exit_code"]) == ("failed", NOT_READY)


# --- models


def cut(model: Path) -> None:
    os.truncate(model / "model.safetensors", 20_000)


def without_a_shard(model: Path) -> None:
    with safe_open(model / "model.safetensors", "pt") as file:
        names = list(file.keys())
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + bool(place)}-of-00002.safetensors" for place, name in enumerate(names)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda model: (model / "config.json").unlink(), ["has no config.json", "save_pretrained"]),
        (lambda model: (model / "config.json").write_text('{"model_type"'), ["config.json cannot be read"]),
        (cut, ["model.safetensors is cut short", "the file has 20000", "copy or download model.safetensors again"]),
        (without_a_shard, ["names model-00002-of-00002.safetensors, which the folder lacks", "copy model-00002"]),
        (
            lambda model: (model / "model.safetensors").unlink(),
            ["has no weights (*.safetensors, *.bin)", "model.path=DIR"],
        ),
        (
            lambda model: [file.unlink() for file in model.glob("tokenizer*")],
            ["the folder has no tokenizer (tokenizer*"],
        ),
        (
            lambda model: (model / "tokenizer.json").write_text("{"),
            ["its tokenizer cannot be loaded", "check the tokenizer"],
        ),
    ],
    ids=[
        "no config",
        "torn config",
        "truncated shard",
        "missing shard",
        "no weights",
        "no tokenizer",
        "torn tokenizer",
    ],
)
def test_a_model_folder_that_is_not_whole(
    damage: Callable[[Path], object], words: list[str], model: Path, refused: Refused
) -> None:
    damage(model)
    told = refused(NOT_READY, words, "tiny.yaml", "model.config=null", f"model.path={model}", "--run-dir", "run")
    assert told.startswith("error: model")


def test_a_model_that_is_nowhere(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        USAGE,
        ["there is no folder", "give a folder with config.json"],
        "tiny.yaml",
        "model.config=null",
        "model.path=./nothing",
    )
    refused(
        USAGE,
        ["model.path: nobody/nothing: it is no folder, not in the hub cache"],
        *("tiny.yaml", "model.config=null", "model.path=nobody/nothing"),
    )
    public = ["tiny.yaml", "model.config=null", "model.path=Qwen/Qwen2.5-0.5B", "--run-dir", "run"]
    refused(NOT_READY, ["the hub cannot be reached", "model.path=/path/to/model"], *public)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(NOT_READY, ["HF_HUB_OFFLINE=1 forbids fetching it", "model.path=DIR"], *public)


# --- this machine


def test_cards_that_are_not_here(refused: Refused) -> None:
    refused(
        NOT_READY,
        ["error: hardware: 8xA800-80GB: this machine has no GPU that nvidia-smi shows", "hardware=auto"],
        *("tiny.yaml", "hardware=8xA800-80GB", "train.global_batch=16"),
    )


def test_cards_of_a_device_map_that_are_not_here(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--device-map", "2gpu-mixed"])
    out, err = capfd.readouterr()
    assert ended.value.code == NOT_READY
    assert re.search(r"layers +RTX 3060 .* embedding, layers 0–", out), "the plan comes first"
    assert re.search(r"RTX 3060 Ti +8\.0 GiB", out)
    assert "norm, head" in out
    assert "this machine has no GPU that nvidia-smi shows" in err
    assert "launch --device-map 2gpu-mixed --rehearse" in err


def test_a_port_that_is_taken(refused: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused(
            NOT_READY,
            [f"launch.port: {port}: cannot be used: Address already in use", "launch.port=null"],
            *("tiny.yaml", f"launch.port={port}"),
        )


def test_a_port_that_is_taken_on_another_address(refused: Refused) -> None:
    with socket.create_server(("127.0.0.2", 0)) as server:
        port = server.getsockname()[1]
        refused(NOT_READY, [f"launch.port: {port}: cannot be used"], "tiny.yaml", f"launch.port={port}")


def test_a_run_directory_with_files_of_somebody_else(here: Path, refused: Refused) -> None:
    mine = here / "mine"
    mine.mkdir()
    (mine / "recipe.yaml").write_text("# my own comments")
    refused(
        NOT_READY,
        ["holds recipe.yaml, which would be written over", "launch.run_dir=DIR"],
        "tiny.yaml",
        "--run-dir",
        "mine",
    )
    assert (mine / "recipe.yaml").read_text() == "# my own comments"


def test_a_folder_that_is_gone(here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = here / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    refused(USAGE, ["the folder you are in is no longer there"], "plan", str(here / "tiny.yaml"))


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_stream_changes_no_exit_code(here: Path, closed: str) -> None:
    for recipe, code in (("tiny.yaml", 0), ("nonsense", USAGE)):
        command = f"exec {sys.executable} -m launcher plan {recipe} {closed}>&-"
        done = subprocess.run(["bash", "-c", command], cwd=here, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_a_run_directory_that_cannot_be_made(refused: Refused) -> None:
    refused(
        NOT_READY,
        ["tiny.yaml/run: cannot be written", "tiny.yaml is no folder", "launch.run_dir="],
        *("tiny.yaml", "--run-dir", "tiny.yaml/run"),
    )
    refused(NOT_READY, ["File name too long", "launch.run_dir="], "tiny.yaml", "--run-dir", "x" * 300)


def test_a_disk_that_may_not_be_written(refused: Refused, small_disk: Callable[..., Path]) -> None:
    disk = small_disk("64m", "ro")
    refused(NOT_READY, ["cannot be written", "launch.run_dir="], "tiny.yaml", "--run-dir", disk / "run")


def test_a_disk_that_is_too_small_for_the_checkpoints(refused: Refused, small_disk: Callable[..., Path]) -> None:
    disk = small_disk("8m")
    told = refused(
        NOT_READY, ["8 MiB free", "for 2 + 1 checkpoints", "checkpoint.keep=1"], "tiny.yaml", "--run-dir", disk / "run"
    )
    assert told.startswith(f"error: run directory {disk / 'run'}: ")
    assert not (disk / "run").exists(), "nothing was started"


def test_a_cache_that_is_full(
    refused: Refused, small_disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk("64k")
    (disk / "ballast").write_bytes(b"x" * 60_000)
    monkeypatch.setenv("LAUNCH_CACHE", str(disk))
    refused(NOT_READY, ["No space left on device", "make room there", "LAUNCH_CACHE"], "tiny.yaml", "--run-dir", "run")
    assert [path.name for path in disk.iterdir()] == ["ballast"], "nothing half-made stays"


def fill(path: Path) -> None:
    """Take all the room that a file system has left."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(descriptor, b"x" * 65536)
    os.close(descriptor)


def test_a_disk_that_fills_up_while_training_keeps_the_older_checkpoint(
    launch: Launcher, small_disk: Callable[..., Path], recipe: Path, tmp_path: Path
) -> None:
    disk = small_disk("80m")
    run = disk / "run"
    often = ["train.max_steps=100000", "train.log_every_steps=100000", "checkpoint.every_steps=20"]
    started = launch.start(recipe, "--run-dir", run, *often)
    started.wait_for_event(run, "save")
    fill(disk / "ballast")

    # Where not even the reason could be written down, ranks that lose each other at their end may abort.
    assert started.process.wait(30) in (1, 128 + signal.SIGABRT)
    assert "no space left on the device" in started.stderr
    assert "make room there, then: launch resume disk0/run" in started.stderr
    assert "Traceback" not in started.stdout + started.stderr
    newest, skipped = manifest.newest_valid(RunDir(run))
    assert newest is not None
    assert skipped == []
    assert f"{newest.folder.name} is complete" in started.stderr
    assert not list(run.glob("checkpoints/.staging*")), "what could not be saved takes no room"


# --- runs


def test_a_run_directory_that_holds_a_run(finished: Path, refused: Refused) -> None:
    refused(
        NOT_READY,
        ["run directory finished: holds a run already", "launch resume finished", "launch.run_dir=DIR"],
        *("tiny.yaml", "--run-dir", "finished"),
    )
    assert report_of(finished)["result"] == "done"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.seed=7", ["train.seed was 42, now 7", "launch RECIPE"]),
        ("train.log_every_steps=1", ["all 4 steps are done", "train longer: launch resume finished train.max_steps=8"]),
        ("data.max_rows=20", ["the training rows are others than before", "put the data back"]),
        ("data.path=empty.json", ["holds no rows"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_resume_that_is_refused_leaves_the_run_as_it_was(
    override: str, words: list[str], finished: Path, refused: Refused
) -> None:
    Path("empty.json").touch()
    kept = {
        name: (finished / name).read_bytes() for name in ("recipe.yaml", "plan.json", "prepared.json", "report.json")
    }
    refused(NOT_READY, words, "resume", "finished", override)
    assert {name: (finished / name).read_bytes() for name in kept} == kept


def test_a_resume_without_a_checkpoint_starts_again(
    finished: Path, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished / "checkpoints")
    Path("empty.json").touch()
    with pytest.raises(SystemExit):
        main(["resume", "finished", "data.path=empty.json"])
    assert "no complete checkpoint in finished: starting from the beginning" in capfd.readouterr().out


def test_an_export_that_is_there_already(finished: Path, refused: Refused) -> None:
    (finished / "export").mkdir()
    refused(
        NOT_READY, [f"export folder {finished.resolve()}/export: is there already", "--out DIR"], "export", "finished"
    )


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("", ["there is nothing in it"]), ("\udcff", ["bytes that are no UTF-8"])],
    ids=["empty", "bytes"],
)
def test_a_question_that_is_none(finished: Path, refused: Refused, prompt: str, words: list[str]) -> None:
    refused(USAGE, words, "chat", "finished", "--prompt", prompt)


def test_a_chat_with_a_torn_plan(finished: Path, refused: Refused) -> None:
    (finished / "plan.json").write_text("{")
    refused(USAGE, ["its plan.json is torn", "launch resume"], "chat", "finished", "--prompt", "hello")


def test_a_chat_with_a_run_that_was_never_prepared(finished: Path, refused: Refused) -> None:
    (finished / "prepared.json").unlink()
    refused(USAGE, ["ended before it was prepared", "launch resume"], "chat", "finished", "--prompt", "hello")
