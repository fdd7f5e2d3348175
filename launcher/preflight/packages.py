"""Installed packages against the ranges that this product's own metadata names, and torch's wheel against the cards. No import of any."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from launcher.cluster import Cluster, driver_version, nvidia_on_the_bus
from launcher.installed import version_of
from launcher.preflight.finding import Finding

DISTRIBUTION = "launch-trainer"
# Oldest driver for programs of a CUDA release, within which minor versions do not matter (NVIDIA, "CUDA Compatibility",
# table 1 of docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


def required() -> dict[str, tuple[str, bool]]:
    """Package -> (range such as `<2.14,>=2.11`, whether only an extra needs it), without what serves tests alone.

    Empty where this product was not installed by pip.
    """
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    ranges: dict[str, tuple[str, bool]] = {}
    for requirement in map(Requirement, texts):
        optional = requirement.marker is not None
        if 'extra == "test"' not in str(requirement.marker) and not (optional and requirement.name in ranges):
            ranges[requirement.name] = str(requirement.specifier), optional
    return ranges


def ranges_kept() -> Iterator[Finding]:
    """One finding for all packages in range, one for each that is missing or out of it."""
    from packaging.specifiers import SpecifierSet

    ranges = required()
    if not ranges:
        found = "is not installed by pip: which versions it wants cannot be looked up"
        yield Finding("warning", f"package {DISTRIBUTION}", found, "in its folder: pip install -e .")
        return
    fine = []
    for name, (wanted, optional) in ranges.items():
        here = version_of(name)
        if here is None and optional:
            continue  # a recipe that needs it is refused with what to type
        if here is None:
            yield Finding("error", f"package {name}", "is not installed", f"pip install '{name}{wanted}'")
        elif not SpecifierSet(wanted).contains(here, prereleases=True):
            found = f"{here} is here, tested is {wanted}; it may work"
            yield Finding("warning", f"package {name}", found, f"pip install '{name}{wanted}'")
        else:
            fine.append(f"{name} {here}")
    yield Finding("ok", "packages", ", ".join(fine))


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for (`13.0`), None for a CPU build or where there is no torch. Torch is not imported."""
    spec = importlib.util.find_spec("torch")
    for folder in spec.submodule_search_locations or () if spec else ():
        file = Path(folder) / "version.py"
        if not file.is_file():
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id == "cuda" and isinstance(node, ast.Assign | ast.AnnAssign):
                return str(node.value.value) if isinstance(node.value, ast.Constant) and node.value.value else None
    return None


def torch_wheel(cluster: Cluster) -> Iterator[Finding]:
    """Whether torch can use the cards that are here."""
    version = version_of("torch")
    if version is None:
        return
    cuda, what = torch_cuda(), f"torch {version}"
    if cluster.kind == "cpu":
        if nvidia_on_the_bus():
            to_type = (
                "install NVIDIA's driver, or start the container with: docker run --gpus all; nvidia-smi must list it"
            )
            yield Finding("warning", "NVIDIA card", f"is plugged in, but {cluster.source}", to_type)
        return
    if cuda is None:
        wanted, _ = required().get("torch", ("", False))
        to_type = (
            f"take the CUDA build: pip install --force-reinstall 'torch{wanted}'  (without an index of CPU builds)"
        )
        yield Finding("error", what, f"is a build for CPUs, and there are {cluster.num_devices} cards", to_type)
        return
    driver = driver_version()
    oldest = _OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    if driver is not None and oldest is not None and int(driver.split(".")[0]) < oldest:
        # No error: data centre cards may have NVIDIA's forward compatibility package. The trial shows whether it works.
        found = f"is built for CUDA {cuda}, which wants driver {oldest} or newer; {driver} is here"
        yield Finding("warning", what, found, f"update the driver to {oldest}, or take a torch build for an older CUDA")
    else:
        yield Finding("ok", what, f"is built for CUDA {cuda}, the driver is {driver or 'unknown'}")
