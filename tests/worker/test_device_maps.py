"""Naive device maps, run for real on pretend devices: placed as planned, within budget, and the same numbers as on one device."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from launcher import supervise
from launcher.cluster import Cluster, Device, Node
from launcher.errors import DoesNotFitError, PreflightError, UsageError
from launcher.families import family
from launcher.memory import CUDA_CONTEXT_BYTES
from launcher.modelshape import shape_of, shape_of_config
from launcher.plan import ChatPlan, Plan, StagePlan, chat_plan, make_plan, read_plan
from launcher.plan.pacing import ends_together
from launcher.recipe import load_recipe
from launcher.recipe.device_maps import DeviceMap
from launcher.remotecode import planned_code
from launcher.worker import spread
from launcher.worker.chat import _room
from tests import logical_devices
from tests.test_modelshape import CONFIGS, TINY, real_model
from tests.worker import old_models
from tests.worker.conftest import Job, ask

RECIPE = """
model:
  dtype: fp32
  config: {{model_type: llama, hidden_size: 64, intermediate_size: 176, num_hidden_layers: 8, num_attention_heads: 4,
           num_key_value_heads: 4, vocab_size: 400, max_position_embeddings: 256, tie_word_embeddings: false}}
data: {{path: {data}, max_length: 128, format: text, eval: {{rows: 2}}}}
adapter: {{type: lora, r: 4, alpha: 8}}
strategy: {{type: device_map, schedule: naive}}
train: {{max_steps: 2, lr: 5e-3, global_batch: 2, micro_batch: 1, log_every_steps: 1}}
checkpoint: {{every_steps: 1, keep: 9}}
"""
Make = Callable[..., "Spread"]
# A plan leaves a card's allocator six hundredths of what comes and goes. Here none are planned, to see the formulas; devices have two.
_GAPS = 1.02
_prepared: dict[str, bytes] = {}
ON_THE_CPU = ("strategy.type=single", "hardware=1xcpu")


@dataclass
class Spread(Job):
    """A job on pretend devices of so many bytes each, beside what a process takes of a card; on the CPU without any."""

    library: Path = Path()
    capacities: tuple[int, ...] = ()
    device_map: DeviceMap | None = None

    @property
    def cluster(self) -> Cluster:
        devices = [
            Device(name=f"pretend-{index}", kind="cuda", memory_bytes=CUDA_CONTEXT_BYTES + size, bf16=True, index=index)
            for index, size in enumerate(self.capacities)
        ]
        return Cluster(nodes=(Node(host="localhost", devices=tuple(devices)),), source="pretend devices")

    def plan(self, *overrides: str) -> Plan:
        if not self.capacities:
            return super().plan(*overrides, *ON_THE_CPU)
        loaded = load_recipe(self.recipe, overrides)
        model, code = planned_code(loaded.recipe.model, self.recipe.parent, self.recipe)
        shape, recipe = shape_of(model, self.recipe.parent), loaded.recipe.model_copy(update={"model": model})
        return make_plan("spread", recipe, self.cluster, shape, code, self.device_map)

    def fill(self, plan: Plan) -> None:
        """Once for all jobs with the same model: preparing takes as long as training here."""
        model = f"{plan.recipe.model.model_dump_json()} {plan.recipe.data.path}"
        if model not in _prepared:
            super().fill(plan)
            _prepared[model] = self.run.prepared.read_bytes()
        self.run.prepared.write_bytes(_prepared[model])

    def ranks(self, plan: Plan, pretend: dict[str, Any] | None = None) -> list[int]:
        if self.capacities:
            sizes = [round(_GAPS * self.capacities[stage.device]) for stage in plan.stages]
            pretend = {"library": str(self.library), "capacities": sizes}
        return super().ranks(plan, pretend)

    def curve(self) -> list[float]:
        return [*self.losses().values(), *(event["loss"] for event in self.events("eval"))]

    def saved(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.run.checkpoints / name)


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> Path:
    """The pretend devices, compiled once and kept in pytest's cache."""
    reason = logical_devices.why_not()
    if reason is not None:
        pytest.skip(reason)
    assert request.config.cache is not None
    return logical_devices.build(request.config.cache.mkdir(logical_devices.version()))


@pytest.fixture(scope="session")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose rows are all cut to data.max_length, so that what is planned is what runs; in mixed.jsonl half of them are short."""
    folder = tmp_path_factory.mktemp("spread")
    for name, short in (("rows", 90), ("mixed", 20)):
        texts = [" ".join(f"{word * row % 97} and" for word in range((90, short)[row % 2])) for row in range(1, 13)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = folder / "spread.yaml"
    recipe.write_text(RECIPE.format(data=folder / "rows.jsonl"))
    return recipe


@pytest.fixture
def make(rank_server: Any, long_rows: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make(name)`: a job on the CPU; `make(name, settings, *shares)`: on devices with these shares of what one would need."""
    monkeypatch.setattr("launcher.plan.moments.ALLOCATOR_RESERVE", 0.0)

    def made(name: str, settings: Sequence[str] = (), *shares: float) -> Spread:
        job = Spread(rank_server, long_rows, tmp_path / name, library)
        if shares:
            job.capacities = (10**12,)
            (stage,) = job.plan("train.gradient_checkpointing=false", *settings).stages
            job.capacities = tuple(round(share * (stage.memory_bytes - CUDA_CONTEXT_BYTES)) for share in shares)
        return job

    return made


def check_peaks(job: Spread, plan: Plan) -> None:
    """Each device at its fullest is within 5 % of what was planned for it, and within its capacity."""
    peaks = job.events("log")[-1]["device_memory_bytes"]
    assert len(peaks) == len(plan.stages) == len(job.capacities)
    for stage, peak in zip(plan.stages, peaks, strict=True):
        assert 0.95 * peak <= stage.memory_bytes - CUDA_CONTEXT_BYTES <= 1.05 * peak
        assert peak <= _GAPS * job.capacities[stage.device] or job.capacities[stage.device] == 0


def test_the_planned_placement_fits_where_equal_halves_run_out_of_memory(make: Make) -> None:
    settings = ("train.gradient_checkpointing=false",)
    job, halves = make("planned", settings, 0.4, 0.75), make("halves", settings, 0.4, 0.75)
    plan = job.prepare(*settings)
    assert {stage.stop - stage.first for stage in plan.stages} != {4}
    assert job.ranks(plan) == [0], job.logs()
    check_peaks(job, plan)

    halves.device_map = DeviceMap(devices=("any",), placement=("0-3", "4-7"))
    with pytest.raises(DoesNotFitError):
        halves.plan(*settings)
    stages = [stage.model_copy(update={"first": 4 * at, "stop": 4 * at + 4}) for at, stage in enumerate(plan.stages)]
    halves.device_map = None
    plan = halves.prepare(*settings).model_copy(update={"stages": tuple(stages)})
    supervise.write_run(plan, halves.run, True)
    assert halves.ranks(plan) != [0]
    assert "OutOfMemoryError: pretend:" in halves.logs()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shares", "settings"),
    [
        ((0.42, 0.75), ("adapter.targets=all-linear", "adapter.dropout=0.1", "train.gradient_checkpointing=false")),
        ((0.6, 0.8), ("train.gradient_checkpointing=true",)),
        ((0.5, 0.7), ("adapter.type=full", "train.gradient_checkpointing=false")),
        ((0.5, 0.7), ("adapter.type=full", "train.global_batch=1")),
        ((0.5, 0.7), ("model.dtype=bf16", "train.gradient_checkpointing=false")),
        ((0.5, 0.7), ("adapter.modules_to_save=[embed_tokens, lm_head]",)),
        ((0.5, 0.7), ("model.config.tie_word_embeddings=true",)),
        ((0.3, 0.4, 0.6), ("train.gradient_checkpointing=false",)),
        ((0.5, 0.7), ("train.micro_batch=4", "train.global_batch=8", "data.batching=padded", "data.path=mixed.jsonl")),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_each_device_is_as_full_as_planned(
    make: Make, shares: tuple[float, ...], settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make("run", settings, *shares)
    monkeypatch.chdir(job.recipe.parent)
    plan = job.prepare(*settings)
    job.capacities = (0,) * len(shares)  # what is a little more than planned shall be measured
    assert job.ranks(plan) == [0], job.logs()
    check_peaks(job, plan)


@pytest.mark.parametrize(
    ("settings", "shares", "weights"),
    [
        (("adapter.targets=all-linear",), (0.32, 0.45), "adapter_model.safetensors"),
        pytest.param(
            ("adapter.type=full", "train.lr=1e-3"),
            (0.5, 0.7),
            "model.safetensors",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["lora", "full"],
)
def test_two_devices_compute_what_one_does_and_a_checkpoint_goes_back_and_forth(
    make: Make, settings: tuple[str, ...], shares: tuple[float, ...], weights: str
) -> None:
    settings = (*settings, "train.schedule=constant", "train.max_grad_norm=null")
    whole, moved = make("whole"), make("moved", settings, *shares)
    assert whole.start(*settings, "train.max_steps=6") == [0], whole.logs()
    devices = moved.capacities
    for steps, capacities in ((2, devices), (4, ()), (6, devices)):
        moved.capacities = capacities
        plan = moved.prepare(*settings, f"train.max_steps={steps}", resume=steps > 2)
        assert moved.ranks(plan) == [0], moved.logs()
        assert plan.resume_from == (f"checkpoints/step-{steps - 2}" if steps > 2 else None)
        if steps == 2:
            check_peaks(moved, plan)
    if "adapter.type=full" not in settings:
        assert {stage.recompute for stage in plan.stages} == {False, True}, "one keeps activations, the other does not"
    assert moved.losses() == pytest.approx(whole.losses(), abs=1e-5)
    assert moved.events("eval")[-1]["loss"] == pytest.approx(whole.events("eval")[-1]["loss"], abs=1e-5)

    # AdamW's first moment after one step is a tenth of the gradient, of every tensor.
    of_one, of_two = (job.saved("step-1/optimizer-rank0.safetensors") for job in (whole, moved))
    assert of_one.keys() == of_two.keys()
    gradients = [key for key in of_one if "|exp_avg|" in key]
    assert len(gradients) == plan.shape.num_layers * 7 * 2 if "adapter.type=full" not in settings else 8 * 9 + 3
    for key in gradients:
        torch.testing.assert_close(of_two[key], of_one[key], rtol=1e-4, atol=1e-7)
    of_one, of_two = (job.saved(f"step-6/{weights}") for job in (whole, moved))
    assert of_one.keys() == of_two.keys()
    for key, value in of_one.items():
        torch.testing.assert_close(of_two[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_attempt_adalora_over_two_devices(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why recipe/rules.py refuses it."""
    monkeypatch.setattr("launcher.recipe.reading.broken_rules", lambda *_: [])
    settings = ("adapter.type=adalora", "train.max_steps=4")
    job = make("adalora")
    job.capacities, job.device_map = (10**8, 10**8), DeviceMap(devices=("any",), placement=("0-3", "4-7"))
    assert job.start(*settings) == [1]
    assert "Expected all tensors to be on the same device" in job.logs()


@pytest.mark.slow
def test_a_quantised_base_over_two_devices(make: Make) -> None:
    """nf4. int8 cannot be tried: torch lets no tensor of a PrivateUse1 backend take the place of one on the CPU, as bitsandbytes wants."""
    pytest.importorskip("bitsandbytes", reason="quantised bases need the extra bitsandbytes")
    settings = ("model.quantization=nf4", "model.config.intermediate_size=192", "model.config.num_hidden_layers=3")
    job = make("nf4", settings, 0.6, 0.8)
    plan = job.prepare(*settings)
    job.capacities = (0, 0)
    assert job.ranks(plan) == [0], job.logs()
    check_peaks(job, plan)


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("glm", True),
        pytest.param("glm", False, marks=pytest.mark.slow),
        pytest.param("baichuan", True, marks=pytest.mark.slow),
    ],
)
def test_a_model_with_its_own_code_has_both_ends_on_the_first_device(
    make: Make, name: str, again: bool, tiny_data: Path, tmp_path: Path
) -> None:
    write = {"glm": old_models.write_glm, "baichuan": old_models.write_baichuan}[name]
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        f"model: {{path: {write(tmp_path / 'model')}, dtype: fp32, trust_remote_code: true}}\n"
        f"data: {{path: {tiny_data}, max_length: 48, eval: {{rows: 4}}}}\n"
        "adapter: {targets: all-linear}\nstrategy: {type: device_map, schedule: naive}\n"
        "train: {max_steps: 3, lr: 5e-3, global_batch: 4, micro_batch: 2, log_every_steps: 1}\n"
    )
    whole, parts = make("whole"), make("parts")
    whole.recipe = parts.recipe = recipe
    parts.capacities, parts.device_map = (10**8, 10**8), DeviceMap(devices=("any",), placement=("0-0", "1-1"))
    setting = f"train.gradient_checkpointing={str(again).lower()}"
    plan = parts.prepare(setting)
    assert [(stage.embedding, stage.head) for stage in plan.stages] == [(True, True), (False, False)]
    assert parts.ranks(plan) == [0], parts.logs()
    assert whole.start(setting) == [0], whole.logs()
    assert parts.curve() == pytest.approx(whole.curve(), abs=1e-5)
    assert all(peak > 0 for peak in parts.events("log")[-1]["device_memory_bytes"])


def stages_of(num_layers: int, together: bool) -> tuple[StagePlan, StagePlan]:
    rest = {"recompute": False, "memory_bytes": 0, "seconds": 0}
    return (
        StagePlan(device=0, first=0, stop=1, embedding=True, head=together, **rest),
        StagePlan(device=1, first=1, stop=num_layers, embedding=False, head=not together, **rest),
    )


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].get("vocab_size") == TINY["vocab_size"]])
def test_every_family_has_a_place_for_each_tensor(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    real_model(config).config.save_pretrained(tmp_path)
    shape = shape_of_config(config, name, "a test")
    stages, devices = (
        stages_of(shape.num_layers, ends_together(shape)),
        (torch.device("cuda", 0), torch.device("cuda", 1)),
    )
    placed = spread.places(family(shape.family), stages, devices, tmp_path, None)
    for tensor, _ in (*real_model(config).named_parameters(), *real_model(config).named_buffers()):
        assert any(tensor.startswith(f"{module}.") for module in placed), tensor
    known = family(shape.family)
    assert placed[known.embedding] == devices[0]
    assert placed[known.norm] == placed[known.head] == devices[0 if ends_together(shape) else 1]
    assert (placed[f"{known.layers}.0"], placed[f"{known.layers}.1"]) == devices


def test_a_model_whose_layers_have_another_name_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "gpt_neox", **{key: TINY[key] for key in TINY if key != "num_key_value_heads"}}
    real_model(config).config.save_pretrained(tmp_path)
    devices = (torch.device("cuda", 0), torch.device("cuda", 1))
    with pytest.raises(
        PreflightError, match=r"has no model\.layers\.0, which layers of the family `unknown` are called"
    ):
        spread.places(family("unknown"), stages_of(2, False), devices, tmp_path, None)


def test_a_parameter_elsewhere_is_seen_before_the_first_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make("job")
    job.capacities = (10**8, 10**8)
    job.device_map = DeviceMap(devices=("any",), placement=("0-3", "4-7"))
    plan = job.plan()
    model = real_model(plan.recipe.model.config)
    meta, cpu = torch.device("meta"), torch.device("cpu")
    monkeypatch.setattr("launcher.worker.spread.stage_devices", lambda _: (meta, meta))
    assert spread.what_is_wrong(model, plan, model) is None
    monkeypatch.setattr("launcher.worker.spread.stage_devices", lambda _: (meta, cpu))
    found = "model.layers.4.self_attn.q_proj.weight lies on meta, planned is cpu"
    assert spread.what_is_wrong(model, plan, model) == found
    assert "DataParallel" in str(spread.what_is_wrong(model, plan, torch.nn.DataParallel(torch.nn.Linear(1, 1))))


LONG = "model.config.max_position_embeddings=4096"


class Talk:
    """A trained run, and what it answers on devices of some sizes."""

    def __init__(self, job: Spread) -> None:
        self.job = job
        assert job.start(LONG) == [0], job.logs()
        self.plan = read_plan(job.run)

    def placed(self, capacities: Sequence[int], context: int, spill: Literal["none", "host"] = "none") -> ChatPlan:
        self.job.capacities = tuple(capacities)
        return chat_plan(self.plan, self.job.cluster, DeviceMap(devices=("any",), spill=spill), context)

    def ask(self, prompt: str, placed: ChatPlan | None = None, tokens: int = 12) -> tuple[str, list[int]]:
        """The answer, and the most memory of every device."""
        out, pretend = self.job.folder / "said.json", None
        argv = [str(self.job.folder), "--prompt", prompt, "--max-new-tokens", str(tokens)]
        if placed is not None:
            sizes = [self.job.capacities[stage.device] for stage in placed.stages]
            pretend = {"library": str(self.job.library), "capacities": sizes}
            argv += ["--placed", placed.model_dump_json()]
        argument = {"argv": argv, "out": str(out), "devices": len(placed.stages) if placed is not None else 0}
        codes = ask(self.job.server, function="tests.worker.talking:talk", argument=argument, ranks=1, pretend=pretend)
        assert codes == [0]
        answer = json.loads(out.read_text())
        return answer["said"], answer["peaks"]


@pytest.fixture(scope="session")
def talk(rank_server: Any, long_rows: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Talk:
    return Talk(Spread(rank_server, long_rows, tmp_path_factory.mktemp("talk") / "run", library))


@pytest.mark.parametrize(
    ("shares", "spill", "words", "in_host"),
    [((0.7, 0.8), "none", 5, False), ((0.85,), "host", 5, True), ((0.75, 0.8), "none", 400, False)],
    ids=["two devices", "a part in host memory", "a question in pieces"],
)
def test_the_answer_is_that_of_one_device_and_no_device_is_fuller_than_planned(
    talk: Talk, shares: tuple[float, ...], spill: Literal["none", "host"], words: int, in_host: bool
) -> None:
    question = " ".join(f"{number} and" for number in range(words))
    context = 1120 if words > 100 else 64  # which question and answer nearly fill
    (whole,) = talk.placed([10**12], context).stages
    placed = talk.placed([round(share * (whole.memory_bytes - CUDA_CONTEXT_BYTES)) for share in shares], context, spill)
    assert (len(placed.stages), placed.in_host > 0) == (len(shares), in_host)
    expected, _ = talk.ask(question)
    said, peaks = talk.ask(question, placed)
    assert said == expected
    assert said.strip()
    for stage, peak in zip(placed.stages, peaks, strict=True):
        planned = stage.memory_bytes - CUDA_CONTEXT_BYTES
        assert planned / 2 < peak <= planned


def test_what_is_longer_than_the_planned_cache_is_refused_before_it_is_read(talk: Talk) -> None:
    placed = talk.placed([10**8, 10**8], 64)
    options = SimpleNamespace(placed=placed, max_new_tokens=40)
    _room(list(range(24)), options)
    with pytest.raises(UsageError, match="25 tokens of question and 40 of answer: there is room for 64") as caught:
        _room(list(range(25)), options)
    assert caught.value.to_type == "--context 65, or /new to forget what was said"
