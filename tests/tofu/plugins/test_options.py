import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tofu.errors import SettingError
from tofu.plugins.options import inline_files, option, options_of, read_options, split_options


@dataclass
class Part:
    share: float = option(0.5, "a share", gt=0, le=1)
    steps: int = option(3, "a number", ge=1)
    kind: str = option("a", "a kind", choices=("a", "b"))
    is_on: bool = option(False, "a switch")
    widths: list = option([8], "widths", ge=1)
    tree: dict = option({}, "a tree")
    inner: int = field(default=7, init=False)


def test_texts_become_values_of_the_fields_types() -> None:
    values = read_options(Part, {"share": "1e-3", "steps": "4", "kind": "b", "is-on": "true"}, prefix="part")
    assert Part(**values) == Part(share=0.001, steps=4, kind="b", is_on=True)
    assert read_options(Part, {"is_on": "false"}, prefix="part") == {"is_on": False}
    assert list(options_of(Part)) == ["share", "steps", "kind", "is-on", "widths", "tree"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("share", "0", "part.share='0' is not usable: expected a number above 0, at most 1"),
        ("share", "nan", "expected a number above 0, at most 1"),
        ("share", "much", "expected a number"),
        ("steps", "0", "expected a whole number at least 1"),
        ("steps", "1.5", "expected a whole number"),
        ("kind", "c", "expected one of a, b"),
        ("is-on", "yes", "part.is-on='yes' is not usable: expected true or false"),
        ("shares", "1", r"part.shares='1' is not usable: expected a known option \(share, steps\)"),
        ("widths", "[1,0]", "a JSON list with entries that are each a number at least 1"),
        ("widths", "[1,", "expected a JSON list, or @FILE with one"),
        ("widths", "{}", "expected a JSON list"),
        ("tree", "[]", "expected a JSON object"),
        ("tree", "@missing.json", "part.tree='@missing.json' is not usable: expected a readable file"),
        ("inner", "1", "expected a known option"),
    ],
)
def test_a_bad_value_is_named_in_one_line(name: str, text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as error:
        read_options(Part, {name: text}, prefix="part")
    assert "\n" not in str(error.value)


def test_a_class_that_forgot_its_decorator_is_told_so() -> None:
    class Forgot:
        share: float = option(0.5, "a share")

    with pytest.raises(SettingError, match=r"decorated with @dataclass \(option share\)"):
        options_of(Forgot)


def test_structures_come_from_json_inline_or_from_a_file(tmp_path: Path) -> None:
    tree = {"animal": {"cat": {}, "dog": {}}, "car": {}}
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    (tmp_path / "tree.toml").write_text("car = {}\n[animal]\ncat = {}\ndog = {}\n")
    for text in (json.dumps(tree), f"@{tmp_path / 'tree.json'}", f"@{tmp_path / 'tree.toml'}"):
        assert read_options(Part, {"tree": text}, prefix="part") == {"tree": tree}
    assert read_options(Part, {"widths": "[16, 32]"}, prefix="part") == {"widths": [16, 32]}


def test_every_instance_has_its_own_default_list() -> None:
    Part().widths.append(9)
    assert Part().widths == [8]


def test_options_split_where_the_next_begins_and_files_become_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "tree.json").write_text('{"a b": {}}')
    text = f"part.tree=@{tmp_path / 'tree.json'}  part.widths=[16, 32] part.is-on=true"
    assert split_options(inline_files(text)) == ['part.tree={"a b":{}}', "part.widths=[16, 32]", "part.is-on=true"]
    assert split_options(" ") == []


@pytest.mark.parametrize(("name", "content"), [("bad.json", "{"), ("bad.toml", "= 1")])
def test_a_file_that_cannot_be_parsed_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SettingError, match=f"^part.tree=.*{name}.* is not usable: expected a file of") as error:
        inline_files(f"part.tree=@{tmp_path / name}")
    assert "\n" not in str(error.value)
