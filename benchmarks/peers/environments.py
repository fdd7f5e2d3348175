"""A virtual environment for each peer, built once, with the torch that we have."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

# What each is asked for by name; everything else is what its own requirements give.
PACKAGES = {
    "trl": ("trl==1.16.0", "transformers==5.23.0", "peft==0.21.2"),
    "llamafactory": ("llamafactory==0.9.5",),
    "axolotl": ("axolotl==0.19.0",),
}
TORCH = "2.13.0"
# Wheels for CUDA that their requirements bring and that cannot be imported beside a torch for CPUs; text models use none of them.
UNUSABLE = ("torchvision", "torchaudio", "xformers", "flash-linear-attention")


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment below a folder, built where it is not there. Downloads some GB."""
    home = folder / name
    python, marker = home / "bin" / "python", home / "built"
    if marker.exists():
        return python
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={TORCH}\n", encoding="utf-8")
    pip = [str(python), "-m", "pip"]
    install = [*pip, "install", "-q", "-c", str(constraints), f"torch=={TORCH}+cpu", *PACKAGES[name]]
    subprocess.run(install, check=True)
    subprocess.run([*pip, "uninstall", "-q", "-y", *UNUSABLE], check=True, stderr=subprocess.DEVNULL)
    if name == "llamafactory":
        _stub_torchaudio(python)
    marker.touch()
    return python


def versions(python: Path) -> str:
    """What matters of an environment."""
    code = (
        "import importlib.metadata as m\n"
        "for n in ('trl','llamafactory','axolotl','transformers','torch','peft','accelerate'):\n"
        "    try: print(n, m.version(n), end=' ')\n"
        "    except m.PackageNotFoundError: pass"
    )
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _stub_torchaudio(python: Path) -> None:
    """LLaMA-Factory imports torchaudio whatever is trained."""
    where = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    stub = Path(where) / "torchaudio"
    shutil.rmtree(stub, ignore_errors=True)
    stub.mkdir()
    (stub / "__init__.py").write_text('__version__ = "0"\n', encoding="utf-8")
    (stub / "functional.py").write_text("", encoding="utf-8")
