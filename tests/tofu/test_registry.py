import sys

import pytest

from tests.processes import run
from tofu.errors import SettingError
from tofu.registry import Registry

BASE = """
from tofu.registry import Registry
class Shape:
    name = ""
shapes = Registry("shape", "figures:Shape", "figures.built_in")
"""
SQUARE = """
import figures
@figures.shapes.register("square")
class Square(figures.Shape):
    pass
"""
OTHERS = """
import figures
@figures.shapes.register("circle")
class Circle(figures.Shape):
    pass
class NoShape:
    pass
raise_on_import = None
"""


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """A registry of a package with two built-in entries, in two files."""
    package = tmp_path / "figures"
    (package / "built_in").mkdir(parents=True)
    (package / "__init__.py").write_text(BASE)
    (package / "built_in" / "__init__.py").write_text("")
    (package / "built_in" / "square.py").write_text(SQUARE)
    (package / "built_in" / "circle.py").write_text(OTHERS)
    (tmp_path / "own_figures.py").write_text("import figures\nclass Own(figures.Shape):\n    pass\n")
    (tmp_path / "broken_figures.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    import figures

    yield figures.shapes
    for name in [name for name in sys.modules if name.partition(".")[0] in ("figures", "own_figures")]:
        del sys.modules[name]


def test_built_in_names_are_listed_by_file_without_importing_the_modules(shapes):
    assert shapes.names() == ("circle", "square")
    assert "figures.built_in.square" not in sys.modules


def test_a_built_in_entry_is_imported_when_it_is_asked_for_and_knows_its_name(shapes):
    square = shapes.get("square")
    assert (square.__module__, square.name) == ("figures.built_in.square", "square")
    assert "figures.built_in.circle" not in sys.modules


def test_a_module_and_class_need_no_registration(shapes):
    assert shapes.get("own_figures:Own").__name__ == "Own"


def test_an_entry_that_is_registered_elsewhere_is_listed_last(shapes):
    import figures

    @shapes.register("hexagon")
    class Hexagon(figures.Shape):
        pass

    assert shapes.names() == ("circle", "square", "hexagon")
    assert shapes.get("hexagon") is Hexagon


def test_a_name_can_be_registered_once(shapes):
    import figures

    shapes.register("hexagon")(type("Hexagon", (figures.Shape,), {}))
    with pytest.raises(ValueError, match="hexagon"):
        shapes.register("hexagon")(type("Other", (figures.Shape,), {}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("triangle", "circle, square, or package.module:Class"),
        (":Own", "package.module:Class"),
        ("own_figures:", "package.module:Class"),
        ("own_figures:Missing", "AttributeError"),
        ("no_such_module_here:Own", "ModuleNotFoundError"),
        ("broken_figures:Own", "ZeroDivisionError"),
        ("figures.built_in.circle:NoShape", "figures.Shape"),
        ("figures.built_in.circle:raise_on_import", "figures.Shape"),
    ],
)
def test_an_unusable_name_says_what_is_expected(shapes, name, expected):
    with pytest.raises(SettingError) as error:
        shapes.get(name)
    assert (error.value.field, error.value.value) == ("shape", name)
    assert expected in error.value.accepted


def test_without_a_base_class_any_callable_can_be_registered():
    functions = Registry("function", None)
    assert functions.register("double")(lambda x: 2 * x)(4) == 8
    assert functions.get("double")(4) == 8
    with pytest.raises(SettingError):
        functions.get("math:pi")


def test_a_source_that_is_not_installed_has_no_entries():
    assert Registry("shape", None, "no_such_package_here.shapes").names() == ()


def test_importing_the_registry_does_not_load_torch():
    code = "import sys, tofu.registry; sys.exit('torch' in sys.modules)"
    run([sys.executable, "-c", code], check=True)


def test_a_class_that_lacks_a_method_is_refused_by_the_methods_name(tmp_path, monkeypatch):
    source = "import abc\nclass Base(abc.ABC):\n    @abc.abstractmethod\n    def area(self): ...\n"
    (tmp_path / "abstract_figures.py").write_text(source + "class Half(Base):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingError, match=r"expected a class that also defines area$"):
        Registry("shape", "abstract_figures:Base").get("abstract_figures:Half")
