"""The recipe: eight sections of plain values in, a frozen `Recipe` out. No file is read here and nothing is derived.

Every field carries one sentence, the only description of it: error messages, the JSON Schema for editors and the
reference page are made from it. What is left out has the default seen here; `auto` is decided by `launcher.plan`,
which shows the decision with its reason and never writes it back into the recipe.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(ge=1)]
# YAML gives lists; a frozen recipe holds tuples.
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Section(BaseModel):
    """Base of every section: an unknown key is an error, and a section never changes after it was read."""

    # No field means anything when it is infinite, and JSON, in which the plan is kept, has no word for it.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that an annotation such as `Eval | None` holds, None for plain values."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


class Model(Section):
    """Which model is trained, and in which precision."""

    path: str | None = Field(
        None, description="A hub id (`THUDM/chatglm2-6b`) or a folder that holds config.json and weights."
    )
    config: dict[str, Any] | None = Field(
        None,
        description="Instead of a path: a transformers config (with `model_type`), for a model from random weights.",
    )
    revision: str | None = Field(None, description="The branch, tag or commit of a hub id; null is its main branch.")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Precision of the computation; auto is bf16 where the card has it, fp16 on older cards, fp32 on a CPU.",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none", description="How the frozen base is stored under an adapter: as it is, in 8 bits, or in 4 bits (QLoRA)."
    )
    trust_remote_code: bool = Field(False, description="Allow the model's own .py files to be executed.")
    code_sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="The digest that the model's own .py files must have; `launch trust` prints it, or pins it in a lock file.",
    )


class Eval(Section):
    """Which rows are kept for evaluation; give one of the three."""

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="Share of the rows kept for evaluation, drawn with train.seed."
    )
    rows: PositiveInt | None = Field(None, description="Number of rows kept for evaluation, drawn with train.seed.")
    path: str | Names | None = Field(None, description="File or folder of evaluation rows, in the format of data.path.")


class Fields(Section):
    """What the columns of the file are called, where they differ from the format's own names."""

    instruction: str = Field("instruction", description="alpaca: the column with the task.")
    input: str = Field("input", description="alpaca: the column with the task's input; may be missing in a row.")
    output: str = Field("output", description="alpaca: the column with the answer.")
    context: str = Field("context", description="context_target: the column with the whole prompt, used word for word.")
    target: str = Field("target", description="context_target: the column with the answer.")
    prompt: str = Field("prompt", description="prompt_response: the column with the question.")
    response: str = Field("response", description="prompt_response: the column with the answer.")
    messages: str = Field("messages", description="messages: the column with the list of {role, content}.")
    text: str = Field("text", description="text: the column with the text, all of which is learned.")
    system: str = Field(
        "system", description="alpaca, prompt_response: the column with a system prompt; may be missing."
    )


DataFormat = Literal["alpaca", "context_target", "prompt_response", "messages", "text"]


class Data(Section):
    """What is learned from, and how rows become token sequences."""

    path: str | Names = Field(
        description="JSON, JSONL, Parquet or text file, a folder of such files, or a list of them."
    )
    format: DataFormat = Field("alpaca", description="What a row looks like.")
    fields: Fields = Field(Fields(), description="Names of the columns, where they differ from the format's own.")
    template: str = Field(
        "auto",
        description="How a row becomes a prompt: auto (the tokenizer's chat template, else the family's), `chat`, or the name of a "
        "template of families.yaml.",
    )
    system: str | None = Field(
        None, description="A system prompt put before every conversation that has none of its own."
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        1024, description="The longest sequence in tokens, prompt and answer together."
    )
    overlong: Literal["truncate", "drop"] = Field(
        "truncate",
        description="What happens to a longer row: cut (the answer's end first, never the template), or left out.",
    )
    max_rows: PositiveInt | None = Field(None, description="Use only the first so many rows.")
    streaming: bool = Field(
        False,
        description="Read and tokenise rows while training, from files or addresses (https://, hf://) of any size; needs "
        "train.max_steps.",
    )
    shuffle_rows: PositiveInt = Field(
        8192, description="streaming: so many rows are read ahead, shuffled and sorted into steps of even tokens."
    )
    bad_rows: Literal["error", "skip"] = Field(
        "error",
        description="What happens when a row cannot be read: stop with its file and line, or leave it out and report it.",
    )
    eval: Eval | None = Field(None, description="The rows for evaluation; null evaluates nothing.")
    questions: Names = Field(
        (),
        description="Prompts that the model answers before the first step and after the last; both answers stand in the report.",
    )
    batching: Literal["auto", "padded", "bucketed", "packed"] = Field(
        "auto",
        description="Micro batches of random rows padded to the longest, of rows of like length, or of rows packed into one sequence "
        "without padding.",
    )


class Adapter(Section):
    """Which weights are trained."""

    type: Literal["lora", "rslora", "dora", "adalora", "full"] = Field(
        "lora", description="An adapter over the frozen model, or `full` for all of its weights."
    )
    r: PositiveInt = Field(
        8, description="Rank of the adapter; under adalora the average rank that remains at the end."
    )
    alpha: Annotated[float, Field(gt=0)] = Field(
        16, description="Scale of the adapter: its output counts alpha / r times."
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout on the adapter's input.")
    targets: Auto | Literal["all-linear"] | Names = Field(
        "auto",
        description="Modules that get an adapter: auto (by family), all-linear (without the head), or a list of names.",
    )
    modules_to_save: Names = Field(
        (), description="Modules trained in full beside the adapter, such as embed_tokens and lm_head."
    )
    init_r: PositiveInt | None = Field(None, description="adalora: the rank every module starts with; null is 1.5 × r.")
    orth_reg_weight: Annotated[float, Field(ge=0.0)] = Field(
        0.5, description="adalora: weight of the orthogonality term in the loss."
    )


class Strategy(Section):
    """How the work is spread over the devices."""

    type: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp", "device_map"] = Field(
        "auto",
        description="One device, a copy on each, sharded by DeepSpeed or FSDP2, or layers spread over the devices.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="ZeRO: what is kept in host memory instead of on the device."
    )
    nvme_path: str | None = Field(
        None,
        description="zero3: a folder on a fast disk of each node, where what is offloaded lies instead of in host memory.",
    )
    deepspeed: str | None = Field(
        None,
        description="ZeRO: a JSON file of your own with what no recipe key sets; null is made from the recipe alone.",
    )
    device_map: str | None = Field(
        None, description="A name in recipes/device_maps or a file; alone it means type: device_map."
    )
    schedule: Literal["auto", "naive", "pipelined"] = Field(
        "auto",
        description="device_map: one device after the other, micro batches in flight on all of them, or the device map's own choice.",
    )
    pipeline: Literal["auto", "1f1b", "gpipe"] = Field(
        "auto",
        description="pipelined: go backward with each micro batch as soon as that can be, or forward with all of them first; auto is 1f1b.",
    )


class EarlyStopping(Section):
    """When to stop before the end."""

    patience: PositiveInt = Field(3, description="Stop after so many evaluations in a row without a better loss.")
    min_delta: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="By how much the evaluation loss has to fall to count as better."
    )


class Train(Section):
    """How long, how fast and in which steps the model learns."""

    epochs: Annotated[float, Field(gt=0)] = Field(1, description="How often every row is seen.")
    max_steps: PositiveInt | None = Field(None, description="Stop after so many optimizer steps, whatever epochs says.")
    lr: Annotated[float, Field(gt=0)] = Field(1e-4, description="The highest learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How the learning rate falls after the warmup."
    )
    warmup: Annotated[float, Field(ge=0)] = Field(
        0.03, description="Warmup: a share of all steps below 1, a number of steps from 1 on."
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="The optimizer; the 8-bit ones come from bitsandbytes."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight decay of AdamW, not applied to biases and norms."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="Gradients are scaled down to this norm; null leaves them."
    )
    micro_batch: PositiveInt | Auto = Field("auto", description="Rows that one device works on at once.")
    global_batch: PositiveInt = Field(
        32,
        description="Rows in one optimizer step over all devices; accumulation is derived from it, so it survives other hardware.",
    )
    gradient_checkpointing: bool | Auto = Field(
        "auto", description="Keep only each layer's input and compute the rest again in the backward pass."
    )
    compile: bool = Field(
        False,
        description="Have torch.compile make kernels of the model's layers: minutes at the first start, faster steps on cards.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        42, description="Seed of the weights, the order of rows and dropout."
    )
    log_every_steps: PositiveInt = Field(10, description="Write metrics every so many steps.")
    eval_every_steps: PositiveInt | Auto = Field(
        "auto", description="Evaluate every so many steps; auto is once an epoch."
    )
    early_stopping: EarlyStopping | None = Field(
        None, description="Stop when the evaluation loss no longer falls; null never does."
    )


class Checkpoint(Section):
    """What is written while training, and whether a run continues."""

    every_steps: PositiveInt | Auto = Field(
        "auto", description="Save every so many steps; auto is once an epoch, and always at the end."
    )
    keep: PositiveInt = Field(
        2, description="How many of the newest complete checkpoints stay; the best one stays beside them."
    )
    max_shard_size: str = Field(
        "2GB",
        pattern=r"^[1-9]\d*(MB|GB)$",
        description="Largest safetensors file of saved weights, such as 500MB or 2GB.",
    )
    resume: Literal["never", "auto"] = Field(
        "never", description="auto continues from the newest valid checkpoint of launch.run_dir where there is one."
    )
    init_from: str | None = Field(
        None,
        description="A checkpoint of ours, of transformers' Trainer or of PEFT to begin with, by its weights and the optimizer's moments "
        "where they can be read; steps, learning rate and rows begin anew.",
    )
    async_: bool = Field(
        False,
        alias="async",
        description="Copy what is saved into host memory and write it while training goes on.",
    )
    on_failure: Literal["stop", "warn"] = Field(
        "stop",
        description="What happens when a checkpoint cannot be written (a full disk): the run ends and can be resumed from the one before, "
        "or it goes on and says so; older checkpoints stay either way, and the last step's has to be written.",
    )


class Ssh(Section):
    """How other hosts are reached; what is left out is as ~/.ssh/config says."""

    user: str | None = Field(None, pattern=r"^[A-Za-z_][\w.-]*$", description="The user on the other hosts.")
    port: Annotated[int, Field(ge=1, le=65535)] | None = Field(None, description="The port of their sshd.")
    key: str | None = Field(None, min_length=1, description="The file of the private key.")
    python: str | None = Field(
        None, min_length=1, description="The Python there that has this launcher; null is the path of the one here."
    )
    timeout_s: PositiveInt = Field(10, description="How long a connection may take.")


class Launch(Section):
    """How the processes are started."""

    backend: Literal["torchrun", "deepspeed", "python"] = Field(
        "torchrun",
        description="What starts the ranks of a node: torchrun, DeepSpeed's launcher, or nothing (one process).",
    )
    run_dir: str | None = Field(None, description="The run directory; null is runs/<recipe>-<time>.")
    port: Annotated[int, Field(ge=1024, le=65535)] | None = Field(
        None, description="The rendezvous port; null takes a free one."
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        0,
        description="How often a failed run is started again from its newest valid checkpoint, unless the failure would come again.",
    )
    stall_seconds: Annotated[float, Field(gt=0.0)] | Auto = Field(
        "auto",
        description="A run whose rank gives no sign of life for so long in a step is ended, with the stacks of all; auto is ten times "
        "the longest so far, at least 300; loading, the first step and saving may take longer.",
    )
    ssh: Ssh = Field(Ssh(), description="How other hosts are reached.")


class Recipe(Section):
    """A whole recipe."""

    model: Model = Field(description="Which model is trained, and in which precision.")
    data: Data = Field(description="What is learned from, and how rows become token sequences.")
    adapter: Adapter = Field(Adapter(), description="Which weights are trained.")
    strategy: Strategy = Field(Strategy(), description="How the work is spread over the devices.")
    train: Train = Field(Train(), description="How long, how fast and in which steps the model learns.")
    checkpoint: Checkpoint = Field(
        Checkpoint(), description="What is written while training, and whether a run continues."
    )
    hardware: str | Names = Field(
        "auto",
        description="What the recipe is for: `8xA800-80GB`, `2xcpu`, a list of cards, or `auto` for what this machine has.",
    )
    launch: Launch = Field(Launch(), description="How the processes are started.")
