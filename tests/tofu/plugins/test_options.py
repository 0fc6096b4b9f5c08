from dataclasses import dataclass, field

import pytest

from tofu.errors import SettingError
from tofu.plugins.options import option, options_of, read_options


@dataclass
class Part:
    share: float = option(0.5, "a share", above=0, most=1)
    steps: int = option(3, "a number", least=1)
    kind: str = option("a", "a kind", choices=("a", "b"))
    is_on: bool = option(False, "a switch")
    inner: int = field(default=7, init=False)


def test_texts_become_values_of_the_fields_types() -> None:
    values = read_options(Part, {"share": "1e-3", "steps": "4", "kind": "b", "is-on": "true"}, prefix="part")
    assert Part(**values) == Part(share=0.001, steps=4, kind="b", is_on=True)
    assert read_options(Part, {"is_on": "false"}, prefix="part") == {"is_on": False}
    assert list(options_of(Part)) == ["share", "steps", "kind", "is-on"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("share", "0", "part.share='0' is not usable: expected a finite number above 0, at most 1"),
        ("share", "nan", "a finite number above 0, at most 1"),
        ("share", "much", "expected a number"),
        ("steps", "0", "a finite number at least 1"),
        ("steps", "1.5", "expected a whole number"),
        ("kind", "c", "expected one of a, b"),
        ("is-on", "yes", "part.is-on='yes' is not usable: expected true or false"),
        ("shares", "1", r"part.shares='1' is not usable: expected a known option \(share, steps\)"),
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
