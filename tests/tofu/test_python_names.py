"""Errors of Python calls name arguments and settings with underscores, those of the command line with dashes."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

import tofu
from tests import processes
from tofu.errors import RunError, SettingError, python_names
from tofu.flower.in_process import run_in_process


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def run(**settings: Any) -> Any:
    return tofu.run(**{"dataset": "digits", "clients": 4, "progress": False} | settings)


@pytest.mark.parametrize(
    ("call", "start"),
    [
        (lambda: tofu.compress(proxies_below=2), "proxies_below=2"),
        (lambda: tofu.Compressed(FedAvg(), step_ahead=2), "step_ahead=2"),
        (lambda: tofu.secure(noise_multiplier=-1), "noise_multiplier=-1"),
        (lambda: tofu.SecureAggregation(FedAvg(), clip_norm=0), "clip_norm=0"),
        (lambda: tofu.hybrid(secure={"weight_step": 2}), "weight_step=2"),
        (lambda: tofu.Hybrid(FedAvg()), "switch_round=0"),
        (lambda: tofu.compress(net, ratoi=3), "ratoi=3 is not usable: expected the argument ratio"),
        (lambda: tofu.compress(net, x="y"), "x='y' is not usable: expected one of the arguments model, input_shape, "),
        (lambda: tofu.compress(net, ratio="high"), "ratio='high' is not usable: expected a number from 1 to 1e+06"),
        (lambda: tofu.compress("Net"), "model='Net' is not usable: expected a torch.nn.Module, or a function () -> "),
        (lambda: tofu.compress(net, loss=1), "loss=1 is not usable: expected a function (outputs, targets) -> scalar"),
        (
            lambda: tofu.Compressed(FedAvg(), net, sever_step=1),
            "sever_step=1 is not usable: expected the argument server_step",
        ),
        (lambda: tofu.secure(bist=8), "bist=8 is not usable: expected the argument bits"),
        (lambda: tofu.secure(bits="8"), "bits='8' is not usable: expected a number from "),
        (lambda: tofu.secure(colusion=0), "colusion=0 is not usable: expected the argument collusion"),
        (lambda: tofu.SecureAggregation(FedAvg(), dropot=0), "dropot=0 is not usable: expected the argument dropout"),
        (lambda: tofu.hybrid(net, ratoi=3), "ratoi=3 is not usable: expected the argument ratio"),
        (lambda: tofu.hybrid(secure={"colusion": 0}), "colusion=0 is not usable: expected the argument collusion"),
        (lambda: tofu.hybrid(secure=16), "secure=16 is not usable: expected a mapping of options"),  # type: ignore
        (lambda: tofu.Hybrid(FedAvg(), ratoi=3, switch_round=2), "ratoi=3 is not usable: expected the argument ratio"),
        (lambda: tofu.Robust(FedAvg(), "median", malicious_fraction=1), "malicious_fraction=1"),
        (lambda: tofu.record(FedAvg(), "x", input_shape=(1, 8, 8), batch_size=0), "batch_size=0"),
        (lambda: tofu.encode(net(), {}, input_shape=(1, 8, 8), target_shape=7), "target_shape=7"),  # type: ignore
        (lambda: run(client_fraction=3), "client_fraction=3"),
        (lambda: run(min_clients=5), "min_clients=5"),
        (lambda: run(partition="natural"), "partition='natural' is not usable: expected a client_column, which"),
        (lambda: run(lerning_rate=1), "lerning_rate=1 is not usable: expected a known setting ("),
        (lambda: run(epochs=1), "epochs=1 is not usable: expected a known setting (local_epochs)"),
        (lambda: tofu.Settings.of({"client_fraction": 3}), "client_fraction=3"),
        (lambda: run_in_process(ServerApp(), ClientApp(), run_config={}, num_supernodes=0), "num_supernodes=0"),
    ],
)
def test_a_python_call_names_its_arguments(call: Callable[[], object], start: str) -> None:
    with pytest.raises(SettingError) as caught:
        call()
    assert str(caught.value).startswith(start)
    assert caught.value.field == start.partition("=")[0]


def test_the_command_line_names_its_options(tmp_path: Path) -> None:
    for flag, start in ("--client-fraction=3", "client-fraction=3.0"), ("--min-clients=99", "min-clients=99"):
        ended = processes.run([sys.executable, "-m", "tofu.cli", "run", flag], cwd=tmp_path)
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"error: {start} is not usable: expected ")
    with pytest.raises(SettingError, match=r"^client-fraction=3 "):
        tofu.Settings.of({"client-fraction": 3})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("lower min-clients, or --client-fraction", "lower min_clients, or client_fraction"),
        ("per-client values, minimum-clients", "per-client values, minimum-clients"),
        ("the folder /data/min-clients and 'min-clients'", "the folder /data/min-clients and 'min-clients'"),
    ],
)
def test_only_names_of_settings_change(text: str, shown: str) -> None:
    with pytest.raises(RunError) as caught, python_names({"min_clients", "client_fraction"}):
        raise RunError(text)
    assert str(caught.value) == shown
