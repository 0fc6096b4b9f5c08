from importlib.util import find_spec

import pytest
import torch

from benchmarks.rivals.nnc import DependentNnc, Nnc, decode
from tests.conftest import Case
from tests.tofu.compression.common import bare, flat, generator, missed, update_of
from tofu.compression.topk import TopK
from tofu.errors import PayloadError, SettingError
from tofu.wire import HEADER_BYTES

pytestmark = pytest.mark.skipif(find_spec("nncodec") is None, reason="pip install --no-deps nncodec")


@pytest.mark.parametrize("ratio", [20, 100, 400])
def test_uses_its_bytes_and_explains_more_than_the_largest_entries(mlp_update: Case, ratio: float) -> None:
    network, update = mlp_update
    compressor = Nnc(network, ratio=ratio)
    made = compressor.compress(network, update, generator=generator())
    allowed = network.param_spec.float32_bytes / ratio - HEADER_BYTES
    assert 0.85 * allowed <= len(made.body) <= allowed
    decoded = Nnc(network, ratio=ratio).decompress(network, made.body)
    assert torch.equal(flat(decoded, network), flat(made.decoded, network))
    topk = TopK(network, ratio=ratio).compress(network, update, generator=generator())
    assert missed(update, made.decoded, network) < missed(update, topk.decoded, network)


def test_dependent_quantization_is_another_code_of_the_same_update(mlp_update: Case) -> None:
    network, update = mlp_update
    bodies = [kind(network, ratio=100).compress(network, update, generator=generator()) for kind in (Nnc, DependentNnc)]
    assert bodies[0].body != bodies[1].body
    assert all(missed(update, made.decoded, network) < 0.6 for made in bodies)


def test_entries_are_multiples_of_one_step_for_all_tensors(mlp_update: Case) -> None:
    network, update = mlp_update
    decoded = flat(Nnc(network, ratio=100).compress(network, update, generator=generator()).decoded, network)
    entries = decoded[decoded != 0].abs()
    step = entries.min()
    assert torch.allclose(entries / step, (entries / step).round(), atol=1e-4)


def test_entries_of_nearly_one_size_fill_the_bytes() -> None:
    """As a residual of many rounds has them: the finest step that fits leaves more than half of the bytes."""
    network = bare((64, 256))
    noise = torch.randn(2, 64, 256, generator=generator())
    made = Nnc(network, ratio=100).compress(
        network, update_of(network, noise[0].sign() * (1 + 0.3 * noise[1])), generator=generator()
    )
    allowed = network.param_spec.float32_bytes / 100 - HEADER_BYTES
    assert 0.9 * allowed <= len(made.body) <= allowed


def test_an_update_of_zeros_takes_no_bytes() -> None:
    network = bare((64, 8))
    made = Nnc(network, ratio=10).compress(network, update_of(network, torch.zeros(512)), generator=generator())
    assert made.body == b""
    assert not flat(made.decoded, network).any()


def test_a_ratio_at_which_not_one_entry_fits_is_refused() -> None:
    with pytest.raises(SettingError, match="with nnc"):
        Nnc(bare((8, 8)), ratio=10)


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        (((32, 8),), "a tensor of 512 entries, expected 256"),
        (((0,),), "a tensor of 512 entries, expected 0"),
        ((), "unknown tensors: '0'"),
    ],
)
def test_bytes_of_another_model_are_refused(shapes: tuple[tuple[int, ...], ...], problem: str) -> None:
    network = bare((64, 8))
    compressor = Nnc(network, ratio=0.5)
    update = update_of(network, torch.randn(64, 8, generator=generator()))
    body = compressor.compress(network, update, generator=generator()).body
    with pytest.raises(PayloadError, match=problem):
        decode(body, [torch.Size(shape) for shape in shapes])
