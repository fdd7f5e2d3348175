"""A small copy of a model with its own code, loaded and trained as the ranks will do it, before any rank starts.

transformers 5 builds a model without memory and fills in what the weights hold. Code written before that computes tables in
its __init__ (positions, masks) that no file holds: they stay uninitialised, without a word. Other code answers to gradient
checkpointing and does nothing. Both are seen here: two layers, as wide as two heads, random weights, rows of the recipe.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from launcher.compat import BUILT_FIRST
from launcher.errors import PreflightError
from launcher.families import family
from launcher.modelshape import trains_head
from launcher.modelshape.small import small_sizes
from launcher.plan import Plan
from launcher.remotecode import Staged
from launcher.rundir import read_json
from launcher.worker.convert import read_shard, weight_files
from launcher.worker.data.batches import Batch, collator
from launcher.worker.pulse import first_line
from launcher.worker.staged import from_config, load_config, load_weights

_TOLERANCE = 1e-5  # of the largest logit: the same kernels on the same weights


def batch_of(plan: Plan, data_dir: Path) -> Batch:
    """The two shortest rows of the recipe, as a rank gets them."""
    from datasets import load_from_disk

    rows = load_from_disk(str(data_dir / "train"))
    shortest = sorted(range(len(rows)), key=lambda row: int(rows[row]["length"]))[:2]
    pad_token_id = read_json(data_dir / "report.json")["pad_token_id"]
    return collator("padded", pad_token_id, family(plan.shape.family).own_mask)([rows[row] for row in shortest])


def try_small(plan: Plan, model_dir: Path, batch: Batch, staged: Staged) -> dict[str, str]:
    """Fixes that the plan does not name and the model needs, with what was found.

    Args:
        batch: a micro batch of the recipe, with labels.

    Raises:
        PreflightError: neither way of loading gives what the code computes, or the planned checkpointing does nothing, or
            head and embedding would not be what the files hold.
    """
    with tempfile.TemporaryDirectory(prefix="launch-trial-") as folder, uninitialised_memory_is_nan():
        small = Path(folder)
        try:
            reference = small_copy(model_dir, small, staged)
            unsaved = {name: tensor.clone() for name, tensor in unsaved_tensors(reference).items()}
            wanted = _logits(reference, batch)
            if not wanted.isfinite().all():
                raise ValueError("its logits are no numbers")
        except PreflightError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model's own code thinks of being small
            print(f"no small copy of {plan.shape.name} could be tried: {type(error).__name__}: {error}", flush=True)
            return _left_empty(model_dir, staged)

        def load(*more: str) -> tuple[Any, str]:
            code = staged.model_copy(update={"fixes": (*staged.fixes, *more)})
            try:
                model = load_weights(small, code, dtype=torch.float32)
                return model, _difference(model, batch, unsaved, wanted)
            except Exception as error:  # noqa: BLE001 - a meta tensor that cannot be copied, for one
                return None, f"{type(error).__name__}: {first_line(error)}"

        fixes = {}
        model, because = load()
        if because:
            model, difference = load(BUILT_FIRST)
            _refuse(plan, because, difference)
            fixes[BUILT_FIRST] = because
        if not _counts_tokens(model, batch):
            fixes["token-loss"] = "its loss does not know how many tokens a step has"
        _check_head(plan, model, model_dir)
        if plan.gradient_checkpointing:
            _check_checkpointing(plan, model, batch)
        return fixes


@contextlib.contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Fresh memory often still holds the very numbers that should be in it; here it never does."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def unsaved_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are not saved and tensors that are plain attributes, by name: what no file of weights can fill."""
    found = {}
    for prefix, module in model.named_modules():
        kept_out = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        for name, value in {**kept_out, **vars(module)}.items():
            if isinstance(value, torch.Tensor):
                found[f"{prefix}.{name}".lstrip(".")] = value
    return found


class Recomputation:
    """Sees, while a model trains, whether anything of one of its layers is computed outside of the model's forward pass.

    That is what checkpointing does. The layer's parts are watched too: transformers checkpoints a layer's forward, and hooks
    of the layer itself stay outside of that.
    """

    def __init__(self, model: torch.nn.Module, layer: int = 0) -> None:
        self.seen = self._inside = False
        stacks = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 0)
        stack = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=None)
        self.known = stack is not None and next(stack.parameters(), None) is not None
        self._hooks = [model.register_forward_pre_hook(self._enter), model.register_forward_hook(self._leave)]
        filled = [each for each in stack or () if next(each.parameters(), None) is not None]  # a stage has some of them
        for module in filled[layer].modules() if filled else ():
            self._hooks.append(module.register_forward_pre_hook(self._compute))

    def _enter(self, module: Any, inputs: Any) -> None:
        self._inside = True

    def _leave(self, module: Any, inputs: Any, output: Any) -> None:
        self._inside = False

    def _compute(self, module: Any, inputs: Any) -> None:
        self.seen = self.seen or not self._inside

    def stop(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()

    def require(self, name: str) -> None:
        """Refuse a model whose layers were computed once.

        Raises:
            PreflightError: checkpointing does nothing.
        """
        if self.known and not self.seen:
            raise PreflightError(
                "train.gradient_checkpointing: true",
                f"the code of {name} takes it and does nothing: no layer is computed again in the backward pass",
                "plan for the memory that it really takes: train.gradient_checkpointing=false",
            )


def small_copy(model_dir: Path, small: Path, staged: Staged, num_layers: int = 2) -> Any:
    """A small copy as the model's code builds it, with random weights; the same weights as a model folder in `small`."""
    from safetensors.torch import save_file

    values = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    sizes = small_sizes({**load_config(model_dir, staged).to_dict(), **values}, num_layers)
    (small / "config.json").write_text(json.dumps({**values, **sizes}), encoding="utf-8")
    model = from_config(load_config(small, staged), staged).float()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        size = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=draw) * size + float(parameter.ndim == 1)
    save_file(
        {key: value.clone() for key, value in model.state_dict().items()}, small / "model.safetensors", {"format": "pt"}
    )
    return model.eval()


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits of a batch.

    Raises:
        PreflightError: forward returns something that has none by name, which no Trainer can use.
    """
    with torch.no_grad():
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        found = f"forward of {type(model).__name__} returns a {type(output).__name__} without `logits`"
        to_type = "let it return a transformers ModelOutput, such as CausalLMOutputWithPast(logits=…)"
        raise PreflightError("the model's own code", found, to_type)
    return logits


def _difference(model: Any, batch: Batch, unsaved: Mapping[str, torch.Tensor], wanted: torch.Tensor) -> str:
    """What of a loaded model is not what its code computes; empty where all is."""
    found = unsaved_tensors(model)
    wrong = [name for name, tensor in unsaved.items() if name not in found or not _same(found[name], tensor)]
    if wrong:
        return f"{wrong[0]} is left uninitialised{f', and {len(wrong) - 1} more' if wrong[1:] else ''}"
    logits = _logits(model, batch)
    if not bool((logits - wanted).abs().max() <= _TOLERANCE * wanted.abs().max()):
        return "its logits are others"
    return ""


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not one.is_meta and torch.equal(one, other.to(one.dtype))


def _left_empty(model_dir: Path, staged: Staged) -> dict[str, str]:
    """The same question for the model in its real size, from what a build without memory leaves without memory."""
    with torch.device("meta"):
        empty = [
            name
            for name, tensor in unsaved_tensors(from_config(load_config(model_dir, staged), staged)).items()
            if tensor.is_meta
        ]
    found = {BUILT_FIRST: f"{empty[0]} would be left uninitialised"} if empty else {}
    return {**found, "token-loss": "whether its loss knows how many tokens a step has could not be tried"}


def _refuse(plan: Plan, because: str, difference: str) -> None:
    """Raise where building and filling is no answer either."""
    quantization = plan.recipe.model.quantization
    if difference:
        raise PreflightError(
            f"model.path: {plan.shape.name}",
            f"a loaded copy does not compute what its code computes: {because}; built and then filled: {difference}",
            "it may be written for another transformers: see what its model card asks for",
        )
    if quantization != "none":
        raise PreflightError(
            f"model.quantization: {quantization}",
            f"transformers loads {plan.shape.name} wrongly ({because}), and what is built first cannot be quantised",
            "set model.quantization=none",
        )


def _counts_tokens(model: Any, batch: Batch) -> bool:
    """Whether the loss is divided by the number of tokens that the Trainer hands on, which makes a step's loss one mean."""
    try:
        with torch.no_grad():
            one, other = (float(model(**batch, num_items_in_batch=num).loss) for num in (8, 16))
    except TypeError:  # no such argument
        return False
    return other < 0.75 * one


def _check_checkpointing(plan: Plan, model: Any, batch: Batch) -> None:
    # As the Trainer does it; transformers 5.17 has the old name only.
    newer = getattr(model, "activation_checkpointing_enable", None)
    enable: Callable[..., None] = newer or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False}, every_n_layers=1, offload=False)
    except (AttributeError, TypeError, ValueError) as error:
        raise PreflightError(
            "train.gradient_checkpointing: true",
            f"the code of {plan.shape.name} has no part in it: {error}",
            "plan for the memory that it really takes: train.gradient_checkpointing=false",
        ) from None
    watch = Recomputation(model.train())
    output = model(**batch)
    (output.loss if output.loss is not None else output.logits.float().mean()).backward()
    watch.stop()
    watch.require(plan.shape.name)


def _check_head(plan: Plan, model: Any, model_dir: Path) -> None:
    """Whether head and embedding are one, or two, as in the files.

    Raises:
        PreflightError: a head of its own would be lost, or one that is shared would be trained as two.
    """
    head, embedding = _name_of(model, model.get_output_embeddings()), _name_of(model, model.get_input_embeddings())
    if head is None or embedding is None:
        return
    tied = model.get_submodule(head).weight is model.get_submodule(embedding).weight
    wanted = {f"{head}.weight", f"{embedding}.weight"}
    stored = {
        key: tensor
        for file in weight_files(model_dir, plan.shape.name)
        for key, tensor in read_shard(file)
        if key in wanted
    }
    if len(stored) < 2:  # nothing to compare; a head that is missing is an error where weights are loaded
        return
    same = torch.equal(*stored.values())
    if tied and not same:
        found = "its files hold a head of its own, which would be lost: its code takes the embedding instead"
        raise PreflightError(
            f"model.path: {plan.shape.name}", found, 'write "tie_word_embeddings": false into its config.json'
        )
    if same and not tied and trains_head(plan.shape, plan.recipe.adapter):
        found = f"head and embedding of {plan.shape.name} are one matrix in its files, and would be trained as two"
        raise PreflightError(
            f"adapter.type: {plan.recipe.adapter.type}", found, "train neither of them: adapter.type=lora"
        )


def _name_of(model: torch.nn.Module, wanted: Any) -> str | None:
    if wanted is None:
        return None
    return next(name for name, module in model.named_modules() if module is wanted)
