import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Case
from tofu.codec.options import ProxySettings
from tofu.codec.proxies import ProxyCode, ProxyData, decode, gradients, proxy_side
from tofu.data import ImageShape
from tofu.errors import PayloadError, SettingError
from tofu.reference_model import ReferenceModel


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_decode_is_the_scaled_gradient_of_the_loss(mlp_update: Case) -> None:
    network, _ = mlp_update
    mode = ProxySettings()
    tensors = len(network.param_spec.parameters)
    proxies = ProxyData((torch.randn(3, 1, 4, 4),), torch.randn(3, 10), None, torch.arange(1.0, tensors + 1))
    grads, decoded = gradients(network, proxies, mode), decode(network, proxies, mode)
    for i, name in enumerate(grads):
        assert torch.equal(decoded[name], (i + 1) * grads[name])


def test_labels_enter_linearly(mlp_update: Case) -> None:
    network, _ = mlp_update
    mode = ProxySettings()
    images, labels = torch.randn(3, 1, 4, 4), torch.randn(2, 3, 10)
    ones = torch.ones(len(network.param_spec.parameters))
    parts = [decode(network, ProxyData((images,), y, None, ones), mode) for y in (labels[0], labels[1], labels.sum(0))]
    for name in parts[0]:
        assert torch.allclose(parts[0][name] + parts[1][name], parts[2][name], atol=1e-4)


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(1, 20), channels=st.integers(1, 3), side=st.integers(2, 9), classes=st.integers(2, 12),
    tensors=st.integers(1, 5), bits=st.sampled_from((2, 4, 8, 16, 32)), weighted=st.booleans(),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_code_round_trip(
    count: int, channels: int, side: int, classes: int, tensors: int, bits: int, weighted: bool, seed: int
) -> None:
    code, g = ProxyCode(count, ((channels, side, side),), (classes,), tensors, bits, weighted), generator(seed)
    labels = torch.randn(count, classes, generator=g)
    proxies = ProxyData(
        (torch.randn(count, channels, side, side, generator=g),),
        labels.softmax(1) if weighted else labels,
        torch.rand(count, generator=g) if weighted else None,
        torch.randn(tensors, generator=g),
    )
    data = code.write(proxies)
    back = code.read(data)
    assert len(data) == code.nbytes
    assert torch.equal(back.inputs[0], code.quantize_inputs(proxies.inputs)[0])
    assert torch.allclose(back.scales, proxies.scales, rtol=2**-7)
    if weighted:
        assert bool((back.labels >= 0).all())
    if bits >= 8:
        assert torch.allclose(back.inputs[0], proxies.inputs[0], atol=0.03 * float(proxies.inputs[0].abs().max()))
        if weighted:
            assert torch.allclose(back.labels.sum(1), torch.ones(count), atol=1e-5)
    with pytest.raises(PayloadError, match="proxies take"):
        code.read(data + b"\0")


def test_side_is_chosen_from_the_input_and_limited_by_it(mlp_update: Case) -> None:
    network, _ = mlp_update
    assert proxy_side(network, ProxySettings()) == 7
    assert proxy_side(ReferenceModel(network.model, ImageShape(1, 28, 28, 10)), ProxySettings()) == 7
    assert proxy_side(network, ProxySettings(size=7)) == 7
    with pytest.raises(SettingError, match="at most the input's side, 8"):
        proxy_side(network, ProxySettings(size=9))


@pytest.mark.parametrize(
    ("field", "value"),
    [("labels", "soft"), ("scale", "row"), ("bits", 7), ("surrogate_beta", -1.0), ("max_evals", 0),
     ("optimizer", "sgd"), ("tolerance", -1.0), ("size", -1), ("size", 1025), ("solve_labels", -1)],
)  # fmt: skip
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"{field.replace('_', '-')}="):
        ProxySettings(**{field: value})  # type: ignore[arg-type]
