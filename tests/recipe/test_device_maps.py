"""recipes/device_maps: looked up by name, checked with file:line, and `launch --device-map NAME`."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import LaunchError, UsageError
from launcher.recipe.device_maps import load_device_map
from launcher.recipe.shipped import shipped_folder
from launcher.start import Asked, Where, asked, plan_recipe

SHIPPED = sorted(path.stem for path in (shipped_folder() / "device_maps").glob("*.yaml"))


def test_those_that_are_shipped() -> None:
    assert {"2gpu-mixed", "8xa800", "3gpu-consumer"} <= set(SHIPPED)
    for name in SHIPPED:
        path, found = load_device_map(name)
        assert path.stem == name
        assert found.devices
        if found.recipe is not None:
            assert (path.parent / found.recipe).is_file()


def written(folder: Path, text: str) -> str:
    path = folder / "map.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("devices: [RTX 3090]\nplacment: auto\n", "map.yaml:2:1  placment: unknown key. Did you mean placement?"),
        ("schedule: fast\n", "map.yaml:1:1  schedule: expected auto, naive or pipelined"),
        ("schedule: naive\n", "devices: is missing"),
        ("devices: [RTX 3090]\nplacement: [0-12, 14-27]\n", "14-27 does not follow"),
        ("devices: [RTX 3090]\nplacement: [all]\n", "'all' is no range of layers. Write it as 0-12"),
        ("devices: [RTX 3090]\nplacement: [5-2]\n", "5-2 does not follow"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(LaunchError) as caught:
        load_device_map(written(tmp_path, text))
    assert found in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_name_that_is_none() -> None:
    with pytest.raises(UsageError, match="did you mean: --device-map 2gpu-mixed"):
        load_device_map("2gpu-mixd")


def test_without_a_recipe_the_map_names_it() -> None:
    found = asked(None, ("train.lr=2e-4",), Where(device_map="2gpu-mixed"))
    loaded, plan = plan_recipe(found)
    assert loaded.name == "chatglm2_lora_2gpu_mixed"
    assert plan.recipe.train.lr == 2e-4
    assert (plan.strategy, len(plan.stages)) == ("device_map", 2)
    assert asked("train.lr=2e-4", (), Where(device_map="2gpu-mixed")).overrides[-1] == "train.lr=2e-4"


def test_neither_recipe_nor_one_that_the_map_names() -> None:
    with pytest.raises(UsageError, match="names no recipe of its own"):
        asked(None, (), Where(device_map="3gpu-consumer"))
    with pytest.raises(UsageError, match="launch recipes"):
        asked(None, (), Where())


def test_explicit_ranges_are_kept_where_they_fit_and_refused_where_not(tmp_path: Path) -> None:
    devices = "devices: [RTX 3060 Ti 8GiB reserved=921MiB, RTX 3060 12GiB]\n"
    recipe = str(shipped_folder() / "chatglm2_lora_2gpu_mixed.yaml")

    def stages(placement: str) -> list[tuple[int, int, int]]:
        file = written(tmp_path, f"{devices}placement: {placement}\n")
        _, plan = plan_recipe(Asked(recipe, (f"strategy.device_map={file}",)))
        return [(stage.device, stage.first, stage.stop) for stage in plan.stages]

    assert stages("[0-12, 13-27]") == [(0, 0, 13), (1, 13, 28)]
    with pytest.raises(LaunchError) as caught:
        stages("[0-25, 26-27]")
    assert caught.value.exit_code == 3
    with pytest.raises(LaunchError) as caught:
        stages("[0-12, 13-20]")
    assert caught.value.exit_code == 2
    assert "has 28 layers" in str(caught.value)
