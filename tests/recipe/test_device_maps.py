"""recipes/device_maps: looked up by name, checked with file:line, and `launch --device-map NAME`."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import main
from launcher.cluster import cluster_of_map
from launcher.errors import DoesNotFitError, RecipeError, UsageError
from launcher.plan import Plan
from launcher.recipe.device_maps import load_device_map
from launcher.recipe.shipped import shipped_folder
from launcher.rundir import RunDir
from launcher.start import Asked, Where, asked, plan_recipe
from launcher.supervise import write_run

SHIPPED = sorted(path.stem for path in (shipped_folder() / "device_maps").glob("*.yaml"))


def test_those_that_are_shipped() -> None:
    assert {"2gpu-mixed", "8xa800", "3gpu-consumer"} <= set(SHIPPED)
    for name in SHIPPED:
        loaded = load_device_map(name)
        path, found = loaded.path, loaded.device_map
        assert path.stem == name
        assert found.devices
        if found.recipe is not None:
            assert (path.parent / found.recipe).is_file()


def written(folder: Path, text: str) -> str:
    path = folder / "map.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


HOW = "Write first and last layer of each device, such as [0-12, 13-27], or placement: auto"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "map.yaml:1:1  is empty; a device map is a mapping with `devices`, such as devices: ["),
        ("- RTX 3090\n", "map.yaml:1:1  holds a list; a device map is a mapping with `devices`"),
        ("devices: []\n", "map.yaml:1:1  devices: is an empty list. Name a card or more"),
        ("devices: [RTX 3090]\nplacment: auto\n", "map.yaml:2:1  placment: unknown key. Did you mean placement?"),
        ("schedule: fast\n", "map.yaml:1:1  schedule: expected auto, naive or pipelined"),
        ("schedule: naive\n", "devices: is missing"),
        ("placement: [0-12, 14-27]\n", "placement.1: 14-27 does not follow: the next layer is 13, without a gap and none twice. "
         "Write placement: [0-12, 13-27]"),
        ("placement: [0-12, 12-27]\n", "Write placement: [0-12, 13-27]"),
        ("placement: [11-0, 12-27]\n", "placement.0: 11-0 ends before it begins. Write placement: [0-11, 12-27]"),
        ("placement: [12-27, 0-11]\n", "list the devices in the order of their ranges"),
        ("placement: [all]\n", f"placement.0: `all` is no range of layers. {HOW}"),
        ("placement: [0, 1-27]\n", "`0` is no range of layers and no number of layers; layer 0 alone is 0-0. " + HOW),
        ("placement: [null, 1-27]\n", f"`null` is no range of layers. {HOW}"),
        ("placement: []\n", f"placement: is an empty list. {HOW}"),
        ("spill: host\nplacement: [0-12, 13-27]\n", "Set placement: auto, or spill: none"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, text: str, found: str) -> None:
    devices = "devices: [RTX 3090, RTX 3060 12GiB]\n" * ("placement" in text)
    with pytest.raises(RecipeError) as caught:
        load_device_map(written(tmp_path, devices + text))
    assert found in str(caught.value)
    assert all("map.yaml:" in problem.where for problem in caught.value.problems)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("devices:\n- RTX 3060\n- RTX 3099\n", "map.yaml:3:3  devices.1: no card is called `RTX 3099`. Did you mean"),
        ("devices: [RTX 3090 resreved=1GiB]\n", "map.yaml:1:11  devices.0: `resreved=1GiB` is no option of a card"),
        ("devices: [RTX 3060 12GiB reserved=13GiB]\n", "map.yaml:1:11  devices.0: "),
        ("devices: [RTX 3090, cpu]\n", "map.yaml:1:1  devices: cards and CPU ranks in one cluster"),
        ("devices: [2xRTX 3090]\nplacement: [0-27]\n", "map.yaml:2:1  placement: has ranges for 1 device, `devices` has 2"),
        ("devices: [RTX 3090]\nplacement: [0-12, 13-27]\n", "map.yaml:2:1  placement: has ranges for 2 devices, `devices` has 1"),
    ],
)  # fmt: skip
def test_mistakes_in_its_devices_stand_in_its_file(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(RecipeError) as caught:
        cluster_of_map(load_device_map(written(tmp_path, text)))
    assert found in str(caught.value)


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
    with pytest.raises(
        DoesNotFitError, match=r"RTX 3060 Ti needs 11\.\d GiB for layers 0–25 and has 7\.1 GiB free"
    ) as full:
        stages("[0-25, 26-27]")
    assert full.value.to_type.startswith("fits, cheapest first:\n    placement: auto in the device map")
    with pytest.raises(RecipeError, match=r"map\.yaml:2:1  placement: places layers 0 to 20, .* has 28 layers"):
        stages("[0-12, 13-20]")


def test_who_says_which_devices(tmp_path: Path) -> None:
    recipe, named = str(shipped_folder() / "alpaca_lora_8xa800.yaml"), Where(device_map="2gpu-mixed")
    model = ("model.path=THUDM/chatglm2-6b", "model.trust_remote_code=false")

    def planned(*overrides: str, before: RunDir | None = None, where: Where = named) -> tuple[Plan, str]:
        plan = plan_recipe(asked(recipe, (*model, *overrides), where), before)[1]
        said = [decision.because for decision in plan.decisions if decision.key == "hardware"]
        return plan, "".join(said)

    plan, said = planned()
    assert plan.cluster.source == "hardware: [RTX 3060 Ti 8GiB reserved=921MiB, RTX 3060 12GiB]"
    assert "the device map's, not the recipe's 8xA800-80GB" in said
    typed, said = planned("hardware=[RTX 3090, RTX 3090]")
    assert {device.name for device in typed.cluster.devices} == {"RTX 3090"}
    assert "typed on the command line; the device map's own devices" in said

    # A run goes on where it was, whatever has become of the file since; another map may be named.
    mine = tmp_path / "mine.yaml"
    mine.write_text("devices: [RTX 3090, RTX 4090]\n", encoding="utf-8")
    for settings, devices in (((), ["RTX 3090", "RTX 4090"]), (("hardware=2xRTX 4090",), ["RTX 4090"] * 2)):
        run = RunDir(tmp_path / f"run{len(settings)}")
        run.create()
        first, _ = planned(*settings, where=Where(device_map=str(mine)))
        write_run(first, run, resuming=False)
        text = mine.read_text()
        mine.unlink()
        _, again = plan_recipe(asked(str(run.recipe), (), Where()), before=run)
        assert [device.name for device in again.cluster.devices] == devices
        assert again.device_map == first.device_map
        mine.write_text(text)
    _, other = plan_recipe(asked(str(run.recipe), (), Where(device_map="3gpu-consumer")), before=run)
    assert other.cluster.num_devices == 3


def test_a_path_counts_from_the_recipe_and_means_the_strategy(tmp_path: Path) -> None:
    folder = tmp_path / "maps"
    folder.mkdir()
    (folder / "mine.yaml").write_text("devices: [2xcpu]\nschedule: naive\n", encoding="utf-8")
    text = (
        (shipped_folder() / "quickstart.yaml").read_text(encoding="utf-8").replace("data/", f"{shipped_folder()}/data/")
    )
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"{text}\nstrategy: {{device_map: maps/mine.yaml}}\n", encoding="utf-8")
    _, plan = plan_recipe(Asked(str(recipe)))
    assert (plan.strategy, plan.schedule) == ("device_map", "naive")
    with pytest.raises(RecipeError, match=r"device map 2gpu-mixd: there is no such device map\. Did you mean"):
        plan_recipe(Asked(str(recipe), ("strategy.device_map=2gpu-mixd",)))


def test_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipes"])
    listed = capsys.readouterr().out
    assert "for --device-map NAME" in listed
    assert all(f"\n{name} " in listed for name in SHIPPED)
