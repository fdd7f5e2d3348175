"""Names of recipes -> files: a path as it is, a bare name beside the user first, then among the shipped ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.recipe import find_recipe, purpose, recipes, shipped, shipped_folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Where the user is: an empty folder; the shipped recipes are `quickstart` and `big_8xa800` in another one."""
    package = tmp_path / "site-packages" / "launcher"
    (package / "_recipes").mkdir(parents=True)
    for name in ("quickstart", "big_8xa800"):
        (package / "_recipes" / f"{name}.yaml").write_text(f"# Shipped {name}. Needs nothing.\n")
    (package / "_recipes" / "schema.json").write_text("{}")
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def write(path: Path, text: str = "# Mine. And more.\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["mine.yaml", "below/mine.yaml", "./mine.yaml", "mine.txt", "mine"])
def test_a_path_works_as_it_is(here, name):
    write(here / name)
    assert find_recipe(name) == Path(name)
    assert find_recipe(str(here / name)) == here / name


def test_a_path_may_start_at_home(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    write(here / "mine.yaml")
    assert find_recipe("~/mine.yaml") == here / "mine.yaml"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_a_bare_name_finds_a_shipped_recipe_with_and_without_its_ending(here, name):
    assert find_recipe(name) == shipped_folder() / "quickstart.yaml"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_what_lies_beside_the_user_comes_before_what_is_shipped(here, name):
    write(here / "quickstart.yaml")
    assert find_recipe(name) == Path("quickstart.yaml")
    if name == "quickstart":
        write(here / "recipes" / "quickstart.yaml")
        assert find_recipe(name) == Path("recipes/quickstart.yaml")


def test_a_bare_name_may_end_in_yml(here):
    write(here / "recipes" / "mine.yml")
    assert find_recipe("mine.yml") == Path("recipes/mine.yml")


def test_a_path_is_looked_up_nowhere_else(here):
    write(here / "recipes" / "below" / "mine.yaml")
    with pytest.raises(UsageError, match="there is no such recipe"):
        find_recipe("below/mine.yaml")


@pytest.mark.parametrize(
    ("name", "found", "to_type"),
    [
        ("quikstart", "there is no such recipe", "did you mean: launch {shipped}/quickstart.yaml"),
        ("quikstart.yaml", "there is no such recipe", "did you mean: launch {shipped}/quickstart.yaml"),
        ("below/quickstart", "there is no such recipe", "did you mean: launch {shipped}/quickstart.yaml"),
        ("mein", "there is no such recipe", "did you mean: launch recipes/mine.yaml"),
        ("zzz", "there is no such recipe", "list the recipes there are: launch recipes"),
        ("~nobody-here/zzz", "there is no such recipe", "list the recipes there are: launch recipes"),
        ("recipes", "is a folder", "list the recipes there are: launch recipes"),
    ],
)
def test_an_unknown_name_gets_the_nearest_that_there_is(here, name, found, to_type):
    write(here / "recipes" / "mine.yaml")
    with pytest.raises(UsageError) as caught:
        find_recipe(name)
    error = caught.value
    expected = (f"recipe {name}", found, to_type.format(shipped=shipped_folder()))
    assert (error.you_set, error.found, error.to_type) == expected


def test_recipes_are_the_users_own_and_the_shipped_ones_without_schema_and_folders(here):
    write(here / "recipes" / "quickstart.yaml")
    write(here / "recipes" / "mine.yaml")
    write(here / "recipes" / "device_maps" / "2gpu.yaml")
    (here / "recipes" / "folder.yaml").mkdir()
    own = [Path("recipes/mine.yaml"), Path("recipes/quickstart.yaml")]
    assert recipes() == [*own, shipped_folder() / "big_8xa800.yaml"]


def test_without_any_of_the_users_own_they_are_the_shipped_ones(here):
    assert [path.stem for path in recipes()] == ["big_8xa800", "quickstart"]


def test_in_a_checkout_the_shipped_ones_lie_beside_the_package():
    folder = shipped_folder()
    assert folder == Path(shipped.__file__).parent.parent.parent / "recipes"
    assert (folder / "quickstart.yaml").is_file()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# One sentence.\nmodel: {}\n", "One sentence"),
        ("# One sentence without an end\nmodel: {}\n", "One sentence without an end"),
        ("# yaml-language-server: $schema=schema.json\n# The purpose. The needs.\n# launch it\n", "The purpose"),
        ("# A sentence over\n# two lines. Another.\n", "A sentence over two lines"),
        ("model: {}\n# Not the head. No.\n", ""),
        ("", ""),
    ],
)
def test_the_purpose_is_the_first_sentence_of_the_head_comment(tmp_path, text, sentence):
    assert purpose(write(tmp_path / "one.yaml", text)) == sentence


def test_a_recipe_that_is_not_utf_8_does_not_spoil_the_list(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_bytes(b"# Caf\xe9. More.\n")
    assert purpose(path) == "Caf�"


@pytest.mark.parametrize("path", sorted(shipped_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_says_what_it_is_for(path):
    assert len(purpose(path)) > 20
