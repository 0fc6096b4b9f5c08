"""Networks of many kinds in uncompressed rounds, and those that are refused."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tofu
from tests.zoo.networks import ACCEPTED, MACHINE, REFUSED
from tests.zoo.plain import averaged
from tofu.data import FederatedData, ImageShape, LabeledImages
from tofu.errors import RunError, SettingError
from tofu.models import build_model
from tofu.models.checks import eager_code
from tofu.running import RunResult
from tofu.settings import Settings

SMALL: dict[str, Any] = {
    "clients": 3, "local_epochs": 1, "train_images": 90, "test_images": 100, "batch_size": 8, "max_evals": 4,
    "ratio": 10.0, "rounds": 2, "workers": 2, "checkpoint": False,
}  # fmt: skip
UNCOMPRESSED: dict[str, Any] = {"schedule": "fedavg", "ema_decay": 0.0}


def run(name: str, folder: Path, **settings: Any) -> RunResult:
    return tofu.run(**SMALL | settings, model=f"tests.zoo.networks:{name}", run_folder=str(folder), progress=False)


def failures(result: RunResult) -> list[object]:
    return [failure for record in result.history for failure in record.failures]


def run_twice(name: str, folder: Path, **settings: Any) -> RunResult:
    """Run a network twice: no reply is lost, and the weights are the same."""
    first, second = (run(name, folder / str(number), **settings) for number in range(2))
    assert first.summary.weights_sha256 == second.summary.weights_sha256
    assert not failures(first)
    assert not failures(second)
    assert torch.is_grad_enabled()
    return first


def plain(name: str, rounds: int) -> tuple[nn.Module, LabeledImages]:
    """Return a network after rounds of federated averaging in plain torch, and the test images."""
    data = FederatedData.of(Settings.of(SMALL).data, seed=0)
    return averaged(ACCEPTED[name], data, rounds=rounds, batch_size=8, lr=0.1), data.test()


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_network_gets_the_weights_of_plain_torch_in_every_run(name: str, tmp_path: Path) -> None:
    result = run_twice(name, tmp_path, **UNCOMPRESSED)
    wrapper = r"^module\.|_orig_mod\."
    expected = {re.sub(wrapper, "", key): value for key, value in plain(name, 2)[0].state_dict().items()}
    for key, value in result.weights.items():
        assert torch.allclose(value, expected[key], rtol=0, atol=5e-5), key


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_cannot_be_trained_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError) as error:
        run(name, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert REFUSED[name][1] in str(error.value)
    assert torch.get_default_dtype() == torch.float32


def test_numbers_that_a_module_draws_when_it_is_imported_are_the_same_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drawn_net.py").write_text(
        "import torch\nfrom torch import nn\nMATRIX = torch.randn(64, 10)\n\n\nclass Net(nn.Linear):\n"
        "    def forward(self, images):\n        return super().forward(images.flatten(1) @ MATRIX)\n\n\n"
        "def build(classes, **_):\n    return Net(10, classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # type: ignore[no-untyped-call]
    outputs = []
    for _ in range(2):
        torch.randn(3)  # as another process, whose generator has another state
        monkeypatch.delitem(sys.modules, "drawn_net", raising=False)
        model = build_model("drawn_net:build", ImageShape(1, 8, 8, 10))
        outputs.append(model(torch.ones(1, 1, 8, 8)))
    assert torch.equal(*outputs)


def test_reentrant_checkpoints_are_refused_where_proxies_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"another compressor \(RuntimeError: When use_reentrant=True"):
        run("reentrant", tmp_path / "proxy")
    assert not failures(run("reentrant", tmp_path / "secure", schedule="secure"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("late_buffer", r"training changed buffer middle\.state"),
        ("late_teacher", r"frozen parameters do not change in training \(middle\.teacher\.weight does\)"),
    ],
)
def test_what_only_later_training_changes_fails_its_client_by_name(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=reason):
        run(name, tmp_path / "run")


def test_the_compiler_is_off_within_a_run_only(tmp_path: Path) -> None:
    compiled: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    function: Any = torch.compile(lambda x: torch.tanh(x) + 1, backend=backend)
    run("compiled", tmp_path / "run", **UNCOMPRESSED)
    assert not compiled
    function(torch.ones(3))
    assert len(compiled) == 1
    with eager_code(), eager_code():
        function(torch.ones(4, 5))
    assert len(compiled) == 1


def test_frozen_weights_that_differ_between_clients_are_found(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="frozen weights"):
        run("frozen_by_thread", tmp_path / "run")


@pytest.mark.parametrize("name", MACHINE)
def test_networks_that_read_other_values_on_clients_than_on_the_server_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="computes the same on server and client"):
        run(name, tmp_path / "run", **UNCOMPRESSED)


def test_what_differs_between_machines_but_is_not_read_does_not_matter(tmp_path: Path) -> None:
    assert not failures(run("unread_by_thread", tmp_path / "run"))
