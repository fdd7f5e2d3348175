"""YAML text -> plain values and the place of every key; overrides on top."""

from __future__ import annotations

import math

import pytest

from launcher.errors import RecipeError, UsageError
from launcher.recipe.document import read_document


@pytest.fixture
def document(tmp_path, monkeypatch):
    """Writes a text to recipe.yaml and reads it as a document; places then start with `recipe.yaml`."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"

    def read(text: str | bytes):
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return read_document(path.relative_to(tmp_path))

    return read


def problems(document) -> list[str]:
    return [str(problem) for problem in document.problems]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3e-4", 3e-4),
        ("1E+3", 1000.0),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("7", 7),
        ("-7", -7),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("1:30:20", "1:30:20"),
        ("2024-01-01", "2024-01-01"),
        ("'3e-4'", "3e-4"),
        ('"7"', "7"),
        ("'true'", "true"),
        ("!!str 7", "7"),
        ("|\n  two\n  lines\n", "two\nlines\n"),
        ("[1, a, {b: 2}]", [1, "a", {"b": 2}]),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        (".Inf", math.inf),
        (".INF", math.inf),
    ],
)
def test_scalars_are_those_of_yaml_1_2(document, written, value):
    found = document(f"key: {written}").values["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("written", [".nan", ".NaN", ".NAN"])
def test_nan_is_a_number(document, written):
    assert math.isnan(document(f"key: {written}").values["key"])


def test_every_key_and_item_has_its_line_and_column(document):
    read = document("# a comment\nmodel: {path: a, config: null}\ndata:\n  path:\n    - one\n    - two\n")
    assert read.values == {"model": {"path": "a", "config": None}, "data": {"path": ["one", "two"]}}
    assert read.places == {
        "": "recipe.yaml:2:1",
        "model": "recipe.yaml:2:1",
        "model.path": "recipe.yaml:2:9",
        "model.config": "recipe.yaml:2:18",
        "data": "recipe.yaml:3:1",
        "data.path": "recipe.yaml:4:3",
        "data.path.0": "recipe.yaml:5:7",
        "data.path.1": "recipe.yaml:6:7",
    }


def test_a_key_that_is_not_written_stands_at_the_nearest_section_above(document):
    read = document("model: {path: a}\ntrain:\n  early_stopping: {}\n")
    assert read.place("train.early_stopping.patience") == "recipe.yaml:3:3"
    assert read.place("train.lr") == "recipe.yaml:2:1"
    assert read.place("adapter.type") == "recipe.yaml:1:1"


def test_paths_count_from_the_folder_of_the_file(document, tmp_path):
    assert document("a: 1").folder == tmp_path


def test_a_key_that_is_set_twice_is_a_problem_and_the_first_counts(document):
    read = document("train: {lr: 1, lr: 2}\ndata: 3\ntrain: 4\n")
    assert read.values == {"train": {"lr": 1}, "data": 3}
    assert problems(read) == [
        "recipe.yaml:1:16  train.lr: is set twice (first at recipe.yaml:1:9). Keep one of the two",
        "recipe.yaml:3:1  train: is set twice (first at recipe.yaml:1:1). Keep one of the two",
    ]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: [", "1:5", "expected the node content, but found '<stream end>'"),
        ("a: {b: 1\n", "2:1", "expected ',' or '}', but got '<stream end>'"),
        ("a: 1\nb: c: d\n", "2:5", "mapping values are not allowed here"),
        ("a: 1\n\tb: 2\n", "2:1", "found character '\\t' that cannot start any token"),
        ("a: 'torn", "1:9", "found unexpected end of stream"),
        ("a: 1\n---\nb: 2\n", "2:1", "but found another document"),
        ("a: *nobody", "1:4", "found undefined alias 'nobody'"),
        ("a: 1\nb: x\x07y\n", "2:5", "special characters are not allowed"),
    ],
)
def test_torn_yaml_is_an_error_at_its_place(document, text, place, words):
    with pytest.raises(RecipeError) as caught:
        document(text)
    assert str(caught.value) == f"recipe.yaml:{place}  is no valid YAML: {words}\n1 error, nothing was started"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("~", "is empty"),
        ("- model\n- data\n", "holds a list"),
        ("just words\n", "holds 'just words'"),
        ("7\n", "holds 7"),
    ],
)
def test_a_recipe_is_a_mapping(document, text, found):
    with pytest.raises(RecipeError) as caught:
        document(text)
    words = f"recipe.yaml:1:1  {found}; a recipe is a mapping with the sections model, data, …"
    assert str(caught.value) == f"{words}\n1 error, nothing was started"


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}"])
def test_endless_nesting_is_an_error_and_no_traceback(document, text):
    with pytest.raises(RecipeError, match="holds itself, or nests too deeply"):
        document(text)


def test_an_alias_repeats_its_anchor_and_its_mistakes_stand_at_the_anchor(document):
    read = document("one: &one {lr: 1e-3}\ntwo: *one\n")
    assert read.values == {"one": {"lr": 1e-3}, "two": {"lr": 1e-3}}
    assert read.place("two.lr") == "recipe.yaml:1:12"
    read.set("two.lr=2")
    assert read.values == {"one": {"lr": 1e-3}, "two": {"lr": 2}}


def test_a_list_as_a_key_is_a_problem(document):
    read = document("? [a, b]\n: 1\nc: 2\n")
    assert read.values == {"c": 2}
    assert problems(read) == ["recipe.yaml:1:3  has a list or a mapping as a key. Write a word"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!int many", "recipe.yaml:1:4  a: 'many' is no number"),
        ("a: !!bool maybe", "recipe.yaml:1:4  a: 'maybe' is no boolean"),
        ("%YAML 1.1\n---\na: no\n", "recipe.yaml:3:4  a: 'no' is no boolean"),
    ],
)
def test_a_value_that_is_not_what_its_tag_says_is_a_problem(document, text, words):
    assert problems(document(text)) == [words]


@pytest.mark.parametrize("content", [b"a: \xff", "a: 1".encode("utf-16"), "a: 数据".encode("gb18030")])
def test_a_file_that_is_not_utf_8_cannot_be_read(document, content):
    with pytest.raises(UsageError, match=r"^recipe\.yaml: cannot be read: 'utf-8' codec can't decode byte") as caught:
        document(content)
    assert caught.value.to_type == "give a recipe as a UTF-8 YAML file"


def test_a_byte_order_mark_is_no_part_of_the_first_key(document):
    assert document(b"\xef\xbb\xbfa: 1").values == {"a": 1}


def test_a_file_that_is_not_there_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="No such file or directory"):
        read_document(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="Is a directory"):
        read_document(tmp_path)


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("train.lr=2e-4", {"train": {"lr": 2e-4, "epochs": 3}}),
        ("train.lr = 2e-4", {"train": {"lr": 2e-4, "epochs": 3}}),
        ("train.lr=2e-4  # as in the paper", {"train": {"lr": 2e-4, "epochs": 3}}),
        ("train.lr='2e-4'", {"train": {"lr": "2e-4", "epochs": 3}}),
        ("train.lr=null", {"train": {"lr": None, "epochs": 3}}),
        ("train.lr=", {"train": {"lr": None, "epochs": 3}}),
        ("train.lr=a=b", {"train": {"lr": "a=b", "epochs": 3}}),
        ("train.lr=[1, two]", {"train": {"lr": [1, "two"], "epochs": 3}}),
        ("train.early_stopping.patience=5", {"train": {"lr": 1e-4, "epochs": 3, "early_stopping": {"patience": 5}}}),
        ("train={lr: 1}", {"train": {"lr": 1}}),
        ("train=null", {"train": None}),
        ("data.eval.rows=4", {"train": {"lr": 1e-4, "epochs": 3}, "data": {"eval": {"rows": 4}}}),
        ("train.lr.max=1", {"train": {"lr": {"max": 1}, "epochs": 3}}),
    ],
)
def test_an_override_sets_a_value_read_as_yaml(document, override, values):
    read = document("train: {lr: 1e-4, epochs: 3}\n")
    read.set(override)
    assert read.values == values
    assert read.problems == []


def test_what_an_override_sets_stands_at_the_override_and_the_rest_in_the_file(document):
    read = document("train: {lr: 1e-4, epochs: 3}\ndata: {path: a, eval: {rows: 2}}\n")
    read.set("train.lr=2e-4")
    assert read.place("train.lr") == "override train.lr=2e-4"
    assert read.place("train.epochs") == "recipe.yaml:1:19"
    read.set("data={path: b, eval: {rows: x}}")
    assert read.place("data.eval.rows") == "override data={path: b, eval: {rows: x}}"
    read.set("adapter.r=4")
    assert read.place("adapter.type") == "override adapter.r=4"
    assert read.from_command_line == {"train.lr", "data", "adapter.r"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr=[", "train.lr: is no valid YAML: expected the node content, but found '<stream end>'"),
        ("train.lr=!!int x", "train.lr: 'x' is no number"),
        (
            "train={lr: 1, lr: 2}",
            "train.lr: is set twice (first at override train={lr: 1, lr: 2}:1:2). Keep one of the two",
        ),
        ("train.lr=&a [*a]", "train.lr: holds itself, or nests too deeply"),
    ],
)
def test_a_mistake_inside_an_override_names_the_override(document, override, words):
    read = document("train: {lr: 1e-4}\n")
    read.set(override)
    assert problems(read) == [f"override {override}  {words}"]


@pytest.mark.parametrize("override", ["train.lr", "=3", ".=3", "train.=3", ".lr=3", "train..lr=3", ""])
def test_what_has_no_key_or_no_equals_sign_is_no_override(document, override):
    with pytest.raises(UsageError) as caught:
        document("a: 1").set(override)
    assert caught.value.you_set == override
    assert caught.value.found == "is neither a flag nor an override"
    assert caught.value.to_type == "write it as section.key=value, e.g. train.lr=2e-4"
