"""The real worker on real gloo ranks: what is trained, and that it is the same however it is spread or interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher import manifest, supervise
from launcher.errors import PreflightError
from launcher.worker.flow import rounds_without_gain
from tests.worker.conftest import Job


def copy_until(source: Job, job: Job, step: int) -> None:
    """What an interruption just after `step` would have left."""
    job.folder.mkdir(parents=True)
    shutil.copytree(source.run.checkpoints, job.run.checkpoints)
    for folder in manifest.folders(job.run):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def weights(job: Job, step: int) -> Path:
    return job.run.checkpoints / f"step-{step}" / "adapter_model.safetensors"


def test_a_run_learns_and_leaves_everything(finished: Job) -> None:
    evals = [event["loss"] for event in finished.events("eval")]
    assert [event["step"] for event in finished.events("eval")] == [0, 4, 8]
    assert evals[-1] < evals[0] - 0.1
    assert [folder.name for folder in manifest.folders(finished.run)] == ["step-8", "step-4"]
    newest, skipped = manifest.newest_valid(finished.run)
    assert newest is not None
    assert newest.manifest is not None
    assert not skipped
    assert newest.manifest.eval_loss == pytest.approx(evals[-1])
    assert {"optimizer-rank0.safetensors", "optimizer-rank1.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= set(
        newest.manifest.files
    )
    assert newest.manifest.world["num_processes"] == 2


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(finished: Job, job: Job) -> None:
    copy_until(finished, job, 4)
    assert job.start(resume=True) == [0, 0], job.logs()
    assert sorted(job.losses()) == [5, 6, 7, 8]
    assert job.losses() == {step: finished.losses()[step] for step in (5, 6, 7, 8)}
    assert weights(job, 8).read_bytes() == weights(finished, 8).read_bytes()


def test_resuming_in_the_middle_of_an_accumulated_epoch_is_exact(job: Job, tmp_path: Path) -> None:
    settings = (
        "train.global_batch=12",
        "train.micro_batch=2",
        "checkpoint.every_steps=3",
        "train.max_steps=6",
        "data.batching=padded",
    )
    whole = Job(job.server, job.recipe, tmp_path / "whole")
    assert whole.start(*settings) == [0, 0], whole.logs()
    copy_until(whole, job, 3)
    assert job.start(*settings, resume=True) == [0, 0], job.logs()
    assert job.losses() == {step: whole.losses()[step] for step in (4, 5, 6)}
    assert weights(job, 6).read_bytes() == weights(whole, 6).read_bytes()


def curve(job: Job) -> list[float]:
    """Losses of every step, then those of the evaluations."""
    return [*job.losses().values(), *(event["loss"] for event in job.events("eval"))]


def test_one_rank_and_four_and_two_of_unlike_speed_compute_the_same(job: Job, tmp_path: Path) -> None:
    """Of the two one has three quarters of every step's tokens."""
    settings = ("adapter.dropout=0", "model.config.attention_dropout=0.0", "train.max_steps=4")
    curves = []
    for hardware, shares in (("1xcpu", ()), ("4xcpu", ()), ("2xcpu", (0.75, 0.25))):
        other = Job(job.server, job.recipe, tmp_path / f"{hardware}{len(shares)}")
        plan = other.prepare(*settings, f"hardware={hardware}").model_copy(update={"shares": shares})
        supervise.write_run(plan, other.run, True)
        assert set(other.ranks(plan)) == {0}, other.logs()
        curves.append(curve(other))
    for other_curve in curves[1:]:
        assert other_curve == pytest.approx(curves[0], abs=2e-5)
    tokens = [sum(scalars(other, f"speed_per_rank/tokens_per_second_{rank}")) for rank in (0, 1)]
    assert tokens[0] > 2 * tokens[1]


def test_a_run_goes_on_with_another_number_of_ranks(finished: Job, job: Job) -> None:
    copy_until(finished, job, 4)
    assert job.start("hardware=1xcpu", resume=True) == [0], job.logs()
    assert sorted(job.losses()) == [5, 6, 7, 8]
    # Dropout draws other numbers, so the curves agree only roughly; the optimizer's state is there or they would not.
    assert list(job.losses().values()) == pytest.approx([finished.losses()[step] for step in (5, 6, 7, 8)], abs=0.1)
    assert "another number of ranks" in job.logs()


@pytest.mark.parametrize(
    "settings",
    [
        ("adapter.type=rslora",),
        ("adapter.type=dora",),
        ("adapter.type=full", "train.lr=1e-3"),
        ("adapter.modules_to_save=[embed_tokens, lm_head]",),
        ("adapter.targets=[q_proj, v_proj]", "train.gradient_checkpointing=true"),
        ("data.batching=packed",),
        ("model.dtype=bf16",),
        ("train.schedule=constant", "train.optimizer=adamw_8bit"),
        # The CPU kernels of bitsandbytes work on blocks of 64.
        (
            "model.quantization=nf4",
            "train.gradient_checkpointing=true",
            "model.config.hidden_size=64",
            "model.config.intermediate_size=128",
        ),
        ("model.quantization=int8",),
    ],
    ids=lambda settings: settings[0],
)
def test_every_way_to_train_lowers_the_loss(job: Job, settings: tuple[str, ...]) -> None:
    overrides = (*settings, "hardware=1xcpu", "train.max_steps=6", "train.micro_batch=4")
    if any("quantization" in text or "8bit" in text for text in settings):
        pytest.importorskip("bitsandbytes", reason="quantised bases need the extra bitsandbytes")
    assert job.start(*overrides) == [0], job.logs()
    evals = [event["loss"] for event in job.events("eval")]
    assert evals[-1] < evals[0]


def test_int8_layers_learn_the_same_with_and_without_checkpointing_on_two_ranks(job: Job, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised bases need the extra bitsandbytes")
    kept = Job(job.server, job.recipe, tmp_path / "kept")
    settings = ("model.quantization=int8", "adapter.dropout=0.1", "train.max_steps=4")
    for one, checkpointing in ((job, "true"), (kept, "false")):
        assert one.start(*settings, f"train.gradient_checkpointing={checkpointing}") == [0, 0], one.logs()
    assert job.losses() == kept.losses()


def test_adalora_takes_ranks_away_and_resumes_exactly(job: Job, tmp_path: Path) -> None:
    settings = (
        "adapter.type=adalora",
        "adapter.r=2",
        "adapter.init_r=6",
        "train.max_steps=12",
        "hardware=1xcpu",
        "checkpoint.every_steps=6",
    )
    whole = Job(job.server, job.recipe, tmp_path / "whole")
    assert whole.start(*settings) == [0], whole.logs()
    ranks = scalars(whole, "adalora/ranks")
    num_modules = 14  # seven linear layers in each of two layers
    assert ranks[0] <= 6 * num_modules
    assert ranks[-1] <= 2 * num_modules
    config = json.loads((whole.run.checkpoints / "step-12" / "adapter_config.json").read_text())
    assert sum(map(sum, config["rank_pattern"].values())) == ranks[-1]
    copy_until(whole, job, 6)
    assert job.start(*settings, resume=True) == [0], job.logs()
    assert job.losses() == {step: whole.losses()[step] for step in range(7, 13)}
    assert weights(job, 12).read_bytes() == weights(whole, 12).read_bytes()


def test_eight_bit_moments_survive_a_resume(job: Job, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="8-bit optimizers need the extra bitsandbytes")
    settings = (
        "adapter.type=full",
        "train.optimizer=adamw_8bit",
        "train.max_steps=4",
        "checkpoint.every_steps=2",
        "hardware=1xcpu",
    )
    whole = Job(job.server, job.recipe, tmp_path / "whole")
    assert whole.start(*settings) == [0], whole.logs()
    kept = load_file(whole.run.checkpoints / "step-4" / "optimizer-rank0.safetensors")
    assert any(name.endswith("/state1") and str(tensor.dtype) == "torch.uint8" for name, tensor in kept.items())
    copy_until(whole, job, 2)
    assert job.start(*settings, resume=True) == [0], job.logs()
    assert job.losses() == {step: whole.losses()[step] for step in (3, 4)}


def test_full_training_resumes_exactly_from_sharded_weights(job: Job, tmp_path: Path) -> None:
    settings = ("adapter.type=full", "train.lr=1e-3", "train.max_steps=4", "checkpoint.every_steps=2", "hardware=1xcpu")
    whole = Job(job.server, job.recipe, tmp_path / "whole")
    assert whole.start(*settings) == [0], whole.logs()
    copy_until(whole, job, 2)
    assert job.start(*settings, resume=True) == [0], job.logs()
    assert job.losses() == {step: whole.losses()[step] for step in (3, 4)}


def test_tensorboard_has_what_people_look_for(finished: Job) -> None:
    board = EventAccumulator(str(finished.run.tensorboard)).Reload()
    tags = set(board.Tags()["scalars"])
    per_rank = {
        f"{name}_{rank}" for rank in (0, 1) for name in ("speed_per_rank/tokens_per_second", "memory_per_rank/peak_gib")
    }
    assert tags >= {
        "train/loss", "train/learning_rate", "train/grad_norm", "speed/tokens_per_second", "speed/padding_share", "eval/loss", *per_rank
    }  # fmt: skip
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 9))
    assert {tag.partition("/")[0] for tag in board.Tags()["tensors"]} >= {"recipe", "plan"}
    assert len(list(finished.run.tensorboard.glob("events*"))) <= 2, (
        "one writer, and one more file for the table of settings"
    )


def scalars(job: Job, tag: str) -> list[float]:
    board = EventAccumulator(str(job.run.tensorboard)).Reload()
    return [event.value for event in board.Scalars(tag)]


def test_early_stopping_ends_the_run_and_keeps_the_best(job: Job) -> None:
    settings = (
        "train.lr=0.5",
        "train.warmup=4",
        "train.max_steps=40",
        "train.eval_every_steps=2",
        "train.early_stopping.patience=2",
    )
    assert job.start(*settings, "hardware=1xcpu", "checkpoint.keep=1", "checkpoint.every_steps=100") == [0], job.logs()
    evals = [event["loss"] for event in job.events("eval")]
    assert len(evals) < 20, "it ended before the last step"
    assert rounds_without_gain(evals, 0.0) == 2
    best = manifest.best_first(job.run)[0]
    assert best[0] == pytest.approx(min(evals[1:]))
    assert manifest.verify(best[1]).problem is None


def test_keep_counts_complete_checkpoints(job: Job) -> None:
    assert job.start(
        "checkpoint.every_steps=1", "checkpoint.keep=2", "train.max_steps=5", "data.eval=null", "hardware=1xcpu"
    ) == [0], job.logs()
    assert [folder.name for folder in manifest.folders(job.run)] == ["step-5", "step-4"]
    assert not [path for path in job.run.checkpoints.iterdir() if path.name.startswith(".")]


def test_a_damaged_checkpoint_is_passed_over_and_left(finished: Job, job: Job) -> None:
    copy_until(finished, job, 8)
    damaged = job.run.checkpoints / "step-8" / "optimizer-rank1.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert job.start(resume=True) == [0, 0], job.logs()
    assert sorted(job.losses()) == [5, 6, 7, 8]
    assert (job.run.checkpoints / "step-8.damaged-1" / damaged.name).read_bytes() == data
    assert manifest.verify(job.run.checkpoints / "step-8").problem is None


def test_rotation_counts_no_damaged_checkpoint(finished: Job, job: Job) -> None:
    copy_until(finished, job, 8)
    flipped = job.run.checkpoints / "step-8" / "adapter_model.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    assert job.start("train.max_steps=7", "checkpoint.keep=1", resume=True) == [0, 0], job.logs()
    newest, skipped = manifest.newest_valid(job.run)
    assert newest is not None
    assert (newest.step, skipped) == (7, [])
    assert (job.run.checkpoints / "step-8.damaged-1" / flipped.name).read_bytes() == data


def test_rows_whose_answer_is_cut_off_are_left_out(job: Job, tmp_path: Path) -> None:
    # With an input the template alone is longer than 42 tokens.
    rows = [{"instruction": "Add", "output": "ok"}] * 2 + [{"instruction": "Add", "input": "1", "output": "two"}] * 38
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = (f"data.path={tmp_path / 'rows.json'}", "data.eval=null", "data.max_length=42", "train.max_steps=1")
    bytes_only = "model.config.vocab_size=262"
    assert job.start(*settings, bytes_only, "train.global_batch=2", "train.micro_batch=1") == [0, 0], job.logs()
    report = json.loads(job.run.prepared.read_text())["report"]
    assert (report["train_rows"], report["rows_dropped"]) == (2, 38)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("an empty table", marks=pytest.mark.slow),
        pytest.param("a torn model"),
        pytest.param("no report", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_folder_of_the_cache_is_made_again(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("LAUNCH_CACHE", str(tmp_path / "cache"))
    settings = ("train.max_steps=1", "hardware=1xcpu", "data.eval=null")
    job.prepare(*settings)
    before = json.loads(job.run.prepared.read_text())
    if damage == "an empty table":
        next(Path(before["data_dir"]).glob("train/*.arrow")).write_bytes(b"")
    elif damage == "a torn model":
        with (Path(before["model_dir"]) / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
    else:
        (Path(before["data_dir"]) / "report.json").unlink()
    assert job.start(*settings) == [0], job.logs()
    after = json.loads(job.run.prepared.read_text())
    assert set(before["cached"]) == set()
    assert len(after["cached"]) == 2, "only what was damaged is made again"


@pytest.mark.parametrize(
    ("override", "word"),
    [("train.seed=7", "train.seed"), ("train.global_batch=4", "train.global_batch"), ("adapter.r=8", "adapter.r")],
)
def test_what_must_not_change_is_refused_on_resume(finished: Job, job: Job, override: str, word: str) -> None:
    copy_until(finished, job, 4)
    with pytest.raises(PreflightError, match=word):
        job.start(override, resume=True)


def test_other_rows_are_refused_on_resume(finished: Job, job: Job, tmp_path: Path) -> None:
    copy_until(finished, job, 4)
    with pytest.raises(PreflightError, match="the training rows are others"):
        job.start("data.max_rows=30", resume=True)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks transformers for it
def test_adapters_are_read_by_peft_alone(finished: Job) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    prepared = json.loads(finished.run.prepared.read_text())
    base = AutoModelForCausalLM.from_pretrained(prepared["model_dir"])
    model = peft.PeftModel.from_pretrained(base, str(finished.run.checkpoints / "step-8"))
    state = load_file(weights(finished, 8))
    assert any(bool(tensor.abs().sum() > 0) for name, tensor in state.items() if "lora_B" in name)
    ids = torch.tensor([[5, 6, 7]])
    with_adapter = model(ids).logits
    with model.disable_adapter():
        assert not torch.equal(with_adapter, model(ids).logits)
