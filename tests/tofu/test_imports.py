"""Packages of extras that are not installed: one line says which extra to install."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tofu.errors import MissingExtraError
from tofu.imports import MODULES, from_extra, import_object
from tofu.privacy.accounting import epsilon_of, noise_multiplier_for


@pytest.mark.parametrize("call", [lambda: epsilon_of(1.0, 1e-5), lambda: noise_multiplier_for(1.0, 1e-5, 3)])
def test_noise_without_its_extra_names_it(call: Callable[[], float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingExtraError, match=r"^dp_accounting is not installed: pip install 'tofu-fl\[privacy\]'$"):
        call()


def test_an_error_inside_of_a_package_that_is_installed_is_not_hidden() -> None:
    with pytest.raises(ImportError, match="no_such_name"), from_extra("privacy"):
        from math import no_such_name  # type: ignore[attr-defined]  # noqa: F401


def test_a_module_that_is_named_as_a_file_is_named_right() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"without \.py: nets:small$"):
        import_object("nets.py:small")


def test_a_module_that_is_not_found_has_a_line_that_says_where_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ModuleNotFoundError, match=rf"'nets_41' in {tmp_path} .*: run .* in the folder of nets_41\.py$"):
        import_object("nets_41.small:Net")
    (tmp_path / "needs_more.py").write_text("import no_such_package")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'no_such_package'$"):
        import_object("needs_more:Net")


def test_modules_are_found_in_the_current_folder_and_in_the_one_of_the_environment_after_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "json.py").write_text("shadow = 1")
        (folder / f"only_{folder.name}.py").write_text(f"place = {folder.name!r}")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(MODULES, str(there))
    assert (import_object("only_here:place"), import_object("only_there:place")) == ("here", "there")
    assert import_object("json:loads")("1") == 1
    monkeypatch.delitem(sys.modules, "only_here")
    monkeypatch.delitem(sys.modules, "only_there")
