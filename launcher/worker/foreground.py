"""Runs chat or export with the terminal of whoever typed it: ends with the launcher, and Ctrl-C is no traceback.

python -m launcher.worker.foreground chat RUN …
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from launcher.errors import InterruptedRunError, LaunchError
from launcher.plan import read_plan
from launcher.rundir import RunDir
from launcher.worker.pulse import die_with_parent
from launcher.worker.quiet import leave_out_what_is_unused


def main(argv: list[str]) -> int:
    """Run the program; its exit code."""
    die_with_parent()
    try:
        leave_out_what_is_unused(read_plan(RunDir(Path(argv[1]))))
        code: int = importlib.import_module(f"launcher.worker.{argv[0]}").main(argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return InterruptedRunError.exit_code
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read the answer has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
