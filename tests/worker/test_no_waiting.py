"""A step never waits for its card: nothing in it reads a value back or copies out of memory that is not pinned. On a pretend device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.worker.conftest import Job
from tests.worker.test_device_maps import Spread, library, long_rows, make  # noqa: F401 - fixtures

# In the ranks: what an operation would have a host wait for in the third step, which neither logs nor saves.
WATCH = """
import json, sys, torch, traceback
from pathlib import Path
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from launcher.worker.training import PlannedTrainer

READS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.unique_dim", "aten._unique2"}

class Watch(TorchDispatchMode):
    def __init__(self, trainer):
        super().__init__()
        self.trainer, self.seen, self.num = trainer, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.trainer.state.global_step == 2:
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
            kinds = {each.device.type for each in tensors}
            name = str(func.overloadpacket)
            self.num += "pretend" in kinds
            copies = name in ("aten._to_copy", "aten.copy_") and len(kinds) > 1
            waits = copies and not (kwargs.get("non_blocking") or (name == "aten.copy_" and len(args) > 2 and args[2]))
            if waits or ("pretend" in kinds and name in READS):
                where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_stack()[-12:-1]]
                self.seen.append([name, where])
        return out

run = PlannedTrainer._run_epoch
def watched(self, *args, **kwargs):
    with Watch(self) as watch:
        run(self, *args, **kwargs)
    (self.run.path / "waits.json").write_text(json.dumps([watch.num, watch.seen]))
PlannedTrainer._run_epoch = watched
"""


def test_a_step_reads_nothing_back_from_its_card(make: Callable[..., Spread], library: Path) -> None:  # noqa: F811
    job = make("watched")
    job.capacities = (10**12,)
    settings = ("strategy={type: single}", "train.max_steps=4", "train.global_batch=2", "train.micro_batch=1")
    settings += ("train.log_every_steps=100", "checkpoint.every_steps=100", "data.eval=null")
    plan = job.prepare(*settings)
    assert (plan.strategy, plan.accumulation, plan.logits) == ("single", 2, "parts")
    pretend = {"library": str(library), "capacities": [0]}
    assert Job.ranks(job, plan, pretend, fault=WATCH, struck=[0]) == [0], job.logs()
    num, seen = json.loads((job.folder / "waits.json").read_text())
    assert num > 500, "operations of one step were watched"
    assert seen == []
