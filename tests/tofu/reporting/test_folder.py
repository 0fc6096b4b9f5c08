"""The run folder: what is stored of the settings."""

from contextlib import closing
from pathlib import Path

import pytest

from tofu.errors import SettingError
from tofu.reporting.folder import RunFolder, fresh_folder
from tofu.reporting.run_settings import read_config, resumed_settings
from tofu.settings import Settings


def test_relative_paths_are_stored_so_that_a_run_is_resumed_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "images").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with closing(RunFolder(Settings.of({"dataset": "images", "run_folder": str(tmp_path / "run")}))):
        assert read_config(tmp_path / "run").data.dataset == str(tmp_path / "here" / "images")
    with closing(RunFolder(resumed_settings({"resume": str(tmp_path / "run"), "dataset": "images"}))):
        pass
    monkeypatch.chdir(tmp_path / "there")
    with closing(RunFolder(resumed_settings({"resume": str(tmp_path / "run")}))):
        pass
    with pytest.raises(SettingError, match="dataset='images' is not usable: expected /"):
        RunFolder(resumed_settings({"resume": str(tmp_path / "run"), "dataset": "images"}))


@pytest.mark.parametrize("dataset", ["digits", "wine", "some/dataset"])
def test_names_of_datasets_are_stored_as_they_are(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wine").mkdir()
    monkeypatch.chdir(tmp_path)
    with closing(RunFolder(Settings.of({"dataset": dataset, "run_folder": "run"}))):
        assert read_config(tmp_path / "run").data.dataset == dataset


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ({}, "mlp-compressed"),  # the default compressor may send a correction alone, so nothing says proxy
        ({"compressor": "sparse"}, "mlp-sparse"),
        ({"schedule": "switch", "switch_round": 2}, "mlp-compressed-switch"),
        ({"schedule": "secure"}, "mlp-secure"),
    ],
)
def test_a_folder_is_named_by_what_its_rounds_send(
    given: dict[str, object], end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fresh_folder(Settings.of({"model": "mlp"} | given)).name.split("-", 2)[2] == end
