"""Python imports this before anything else: it measures whatever trains through transformers.Trainer, which is left as it is otherwise.

LAUNCH_PROBE names a folder: every rank writes <rank>.jsonl there, a line for each micro batch: the optimizer step it belongs to, when
it was done, tokens that are no padding, seconds of CPU time. LAUNCH_PROBE_ROWS names validation rows; rank 0 measures their loss
before every LAUNCH_PROBE_EVERY-th step and after the last, on a clock that stands still meanwhile.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time

_FOLDER, _ROWS = os.environ.get("LAUNCH_PROBE"), os.environ.get("LAUNCH_PROBE_ROWS")
_EVERY = int(os.environ.get("LAUNCH_PROBE_EVERY", "4"))


class _Probe:
    def __init__(self):
        self.rank = os.environ.get("RANK", "0")
        self.file = open(os.path.join(_FOLDER, self.rank + ".jsonl"), "w")  # noqa: SIM115 - as long as the process
        self.paused, self.paused_cpu, self.evaluated = 0.0, 0.0, None

    def write(self, **values):
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def step(self, trainer, inputs, done):
        import torch

        pad = trainer_pad(trainer)
        ids = inputs["input_ids"]
        tokens = ids.numel() if pad is None else int((ids != pad).sum())
        started = self.pause(trainer)
        found = done()
        self.write(
            step=trainer.state.global_step, at=time.time() - self.paused, tokens=tokens, slots=ids.numel(),
            cpu=time.process_time() - self.paused_cpu, began=started, threads=torch.get_num_threads(),
        )  # fmt: skip
        return found

    def pause(self, trainer):
        """Validate where this step is one for it; the time."""
        step = trainer.state.global_step
        if _ROWS and self.rank == "0" and step % _EVERY == 0 and step != self.evaluated:
            self.validate(trainer, step)
        return time.time() - self.paused

    def validate(self, trainer, step):
        import torch
        import torch.nn.functional as F

        started, cpu = time.time(), time.process_time()
        self.evaluated = step
        model = trainer.accelerator.unwrap_model(trainer.model)
        was, total, num = model.training, 0.0, 0
        model.eval()
        with torch.no_grad():
            for batch in torch.load(_ROWS):
                given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
                logits, labels = model(**given).logits[:, :-1].float(), batch["labels"][:, 1:]
                total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
                num += int((labels != -100).sum())
        model.train(was)
        at = started - self.paused
        self.paused += time.time() - started
        self.paused_cpu += time.process_time() - cpu
        self.write(step=step, at=at, eval_loss=total / num)


def trainer_pad(trainer):
    """The id of padding, which is no token of any row here."""
    named = os.environ.get("LAUNCH_PROBE_PAD")
    return int(named) if named else None


def _wrap(module):
    probe = None
    step, train = module.Trainer.training_step, module.Trainer.train

    def training_step(self, model, inputs, *args, **kwargs):
        nonlocal probe
        probe = probe or _Probe()
        return probe.step(self, inputs, lambda: step(self, model, inputs, *args, **kwargs))

    def trained(self, *args, **kwargs):
        found = train(self, *args, **kwargs)
        if probe is not None and probe.rank == "0" and _ROWS and probe.evaluated != self.state.global_step:
            probe.validate(self, self.state.global_step)
        return found

    module.Trainer.training_step, module.Trainer.train = training_step, trained


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        _wrap(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "transformers.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        spec.loader = _Loader(spec.loader)
        return spec


if _FOLDER:
    sys.meta_path.insert(0, _Finder())
