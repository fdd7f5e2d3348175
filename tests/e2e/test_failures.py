from __future__ import annotations
import pytest
from tests.e2e.conftest import Launcher, Sabotage
ACTIONS = {
 "raise": ("raise ValueError('the seventh seal\\nis broken')", 1),
 "kill": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 1),
 "exit7": ("import os; os._exit(7)", 1),
 "segv": ("import ctypes; ctypes.string_at(0)", 0),
}
@pytest.mark.parametrize("name", ACTIONS)
def test_x(name, launch, sabotage, recipe, tmp_path):
    import time
    action, rank = ACTIONS[name]
    t=time.time()
    done = launch(recipe, "--run-dir", tmp_path / "run", **sabotage.step(3, action, rank))
    print(time.time()-t, done.returncode); print(done.stdout); print("-----"); print(done.stderr)
    print((tmp_path / "run" / "errors" / "node.json").read_text())
    print((tmp_path / "run" / "report.json").read_text())
    assert 0
