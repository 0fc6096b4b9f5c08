"""Models fit any image shape, start alike from alike seeds, and say what is wrong with a name."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.processes import run
from tofu.data import ImageShape
from tofu.errors import SettingError
from tofu.models import build_model, model_names
from tofu.models.checks import tensors_of
from tofu.weights import fingerprint, weights_of

DIGITS = ImageShape(1, 8, 8, 10)
MNIST = ImageShape(1, 28, 28, 10)
CIFAR = ImageShape(3, 32, 32, 10)
SMALL_MODELS = ("lenet5", "mlp", "cnn", "vit_tiny")


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def some_images(shape: ImageShape, n: int = 2) -> torch.Tensor:
    return torch.rand(n, shape.channels, shape.height, shape.width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("name", "shape", "norm", "parameters"),
    [
        ("lenet5", MNIST, "none", 61_706),
        ("lenet5", DIGITS, "none", 61_706),
        ("lenet5", CIFAR, "none", 62_006),
        ("mlp", MNIST, "none", 178_110),
        ("cnn", CIFAR, "group", 357_258),
        ("cnn", CIFAR, "none", 356_810),
        ("resnet18", CIFAR, "batch", 11_173_962),
        ("vgg13", CIFAR, "none", 9_410_122),
    ],
)
def test_parameter_counts_are_those_of_the_literature(name: str, shape: ImageShape, norm: str, parameters: int) -> None:
    assert count(build_model(name, shape, norm=norm)) == parameters


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for shape in (DIGITS, MNIST, CIFAR, ImageShape(2, 5, 30, 3))
        for name in model_names()
        # What takes seconds is built for gray images and for large ones, but not for both at once.
        if name != "vit_b_16" and not (shape == MNIST and name in ("dct-snn-vgg5", "dct-snn-vgg9"))
    ],
    ids=str,
)
def test_every_model_takes_every_shape(name: str, shape: ImageShape) -> None:
    model = build_model(name, shape)
    assert model.training
    assert model(some_images(shape)).shape == (2, shape.classes)


@pytest.mark.parametrize(
    ("shape", "patches"), [(ImageShape(1, 30, 21, 3), 64), (ImageShape(3, 90, 96, 3), 36)], ids=str
)
def test_vit_b_16_cuts_small_images_into_patches_of_4_and_others_of_16(shape: ImageShape, patches: int) -> None:
    model = build_model("vit_b_16", shape)
    embedding = next(value for name, value in model.named_parameters() if name.endswith("pos_embedding"))
    assert embedding.shape == (1, patches + 1, 768)


def test_large_images_do_not_blow_up_the_cnn() -> None:
    assert count(build_model("cnn", ImageShape(3, 224, 224, 10))) == count(build_model("cnn", CIFAR))


def test_resnet_keeps_the_size_of_small_images_through_its_stem() -> None:
    stems = {
        side: nn.Sequential(*list(build_model("resnet18", ImageShape(1, side, side, 10)).children())[:4])
        for side in (32, 96)
    }
    assert stems[32](torch.zeros(1, 1, 32, 32)).shape == (1, 64, 32, 32)
    assert stems[96](torch.zeros(1, 1, 96, 96)).shape == (1, 64, 24, 24)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "vgg11"])
def test_norm_is_the_only_normalization_in_the_model(name: str) -> None:
    kinds = (nn.GroupNorm, nn.BatchNorm2d)
    found = {
        norm: {type(module) for module in build_model(name, CIFAR, norm=norm).modules() if isinstance(module, kinds)}
        for norm in ("group", "batch", "none")
    }
    assert found == {"group": {nn.GroupNorm}, "batch": {nn.BatchNorm2d}, "none": set()}


def test_a_group_has_16_channels() -> None:
    norms = [module for module in build_model("cnn", CIFAR).modules() if isinstance(module, nn.GroupNorm)]
    assert [norm.num_channels // norm.num_groups for norm in norms] == [16, 16, 16]


def test_resnet_without_norm_keeps_activations_in_scale() -> None:
    model = build_model("resnet18", CIFAR, norm="none")
    features = nn.Sequential(*list(model.children())[:-2])(some_images(CIFAR))
    assert 0.1 < features.std() < 10


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_weights_are_a_function_of_the_seed(name: str) -> None:
    first, again, other = (
        torch.cat([value.flatten() for value in build_model(name, DIGITS, seed=seed).state_dict().values()])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_generator_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    build_model("lenet5", DIGITS, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [*SMALL_MODELS, "resnet18"])
@pytest.mark.parametrize("norm", ["group", "none"])
def test_a_fresh_model_passes_a_gradient_to_every_weight(name: str, norm: str) -> None:
    model = build_model(name, CIFAR, norm=norm)
    torch.autograd.backward(nn.functional.cross_entropy(model(some_images(CIFAR, 8)), torch.arange(8)))
    dead = [
        key
        for key, value in model.named_parameters()
        if value.ndim > 1 and (value.grad is None or not value.grad.any())
    ]
    assert dead == []


@pytest.mark.parametrize("name", ["resnet", "", "lenet5 "])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(SettingError) as caught:
        build_model(name, DIGITS)
    assert all(known in str(caught.value) for known in model_names())


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(SettingError, match="norm='layer'"):
        build_model("mlp", DIGITS, norm="layer")


FACTORIES = """
from torch import nn

def right(*, channels, height, width, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(20), nn.BatchNorm1d(20), nn.Linear(20, classes))

def too_many(*, channels, height, width, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes + 1))

def raises(*, channels, height, width, classes):
    return nn.Linear(7, classes)

def nothing(*, channels, height, width, classes):
    return None

def positional(channels):
    return nn.Identity()
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "factories_of_a_user.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    yield "factories_of_a_user"
    sys.modules.pop("factories_of_a_user", None)


def test_a_users_factory_is_called_with_the_shape(factories: str) -> None:
    model = build_model(f"{factories}:right", ImageShape(2, 6, 5, 4))
    assert model(some_images(ImageShape(2, 6, 5, 4))).shape == (2, 4)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    assert count(model) == 60 * 20 + 20 + 40 + 20 * 4 + 4
    assert norm.num_batches_tracked == 1, "only the forward pass above, not the check, may touch the statistics"


@pytest.mark.parametrize(
    ("attribute", "why"),
    [
        ("too_many", r"found \[2, 11\]"),
        ("raises", "found RuntimeError"),
        ("nothing", "not NoneType"),
        ("positional", "TypeError"),
        ("absent", "AttributeError"),
    ],
)
def test_a_users_factory_that_does_not_fit_is_refused(factories: str, attribute: str, why: str) -> None:
    with pytest.raises(SettingError, match=why) as caught:
        build_model(f"{factories}:{attribute}", DIGITS)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(SettingError, match="no_such_module"):
        build_model("no_such_module:factory", DIGITS)


def test_a_factory_in_the_current_folder_is_found_and_imported_before_the_seed_is_set(tmp_path: Path) -> None:
    """With the console script, and in a project that has a client.py and a server.py of its own."""
    for name in ("client", "server"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user's module was imported')")
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\nprint(torch.rand(1) * 0)\n"
        "def make(*, channels, height, width, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))\n"
    )
    code = """
import sys
sys.path[:] = [path for path in sys.path if path]
from tofu.data import ImageShape
from tofu.models import build_model
from tofu.weights import weights_of
models = [build_model("net:make", ImageShape(1, 8, 8, 10)) for _ in range(2)]
prints = [{k: v.sum().item() for k, v in weights_of(model).items()} for model in models]
print(prints[0] == prints[1])
import client.app
print(client.app.__file__)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    arguments = [sys.executable, "-c", code]
    done = run(arguments, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, same, client_file = done.stdout.splitlines()
    assert same == "True"
    assert not client_file.startswith(str(tmp_path))


def test_threads_that_build_at_the_same_time_build_the_same_model() -> None:
    shape = ImageShape(1, 28, 28, 10)
    with ThreadPoolExecutor(8) as threads:
        prints = set(threads.map(lambda _: fingerprint(weights_of(build_model("lenet5", shape, seed=3))), range(64)))
    assert len(prints) == 1


def test_outputs_that_refer_to_themselves_have_each_tensor_once() -> None:
    class Output:
        """As the outputs of Hugging Face, with a reference to itself and to its model."""

    output = Output()
    vars(output).update(logits=torch.zeros(2), itself=output, hidden=(torch.ones(3), [output, {"more": torch.ones(4)}]))
    vars(output)["by"] = nn.Linear(2, 3)
    shapes = [tuple(tensor.shape) for tensor in tensors_of(output)]
    assert shapes == [(2,), (3,), (4,)]
