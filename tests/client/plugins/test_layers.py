from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.plugins.layers import Site, capture_inputs, grams, matrix, record_inputs, rows_per_image, sites
from tests.conftest import EveryLayer
from tofu.data import LabeledImages, to_float


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make()


CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided and padded": lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, bias=False),
    "same": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "reflecting": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "1x1": lambda: nn.Conv2d(4, 6, 1),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolutions_patches_times_its_matrix_are_its_output(kind: str) -> None:
    conv = seeded(CONVOLUTIONS[kind])
    images = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs: list[Tensor] = []

    def see(site: Site, rows: Tensor) -> None:
        assert rows.shape[1] == site.columns
        product = rows @ matrix(site, conv).T
        outputs.append(product if conv.bias is None else product + conv.bias[site.start : site.stop])

    with capture_inputs(conv, see):
        expected = conv(images)
    made = torch.cat(outputs, dim=1).view(3, -1, expected.shape[1]).transpose(1, 2).view_as(expected)
    assert torch.allclose(made, expected, atol=1e-5)


def test_linear_layers_of_any_depth_are_rows() -> None:
    layer = seeded(lambda: nn.Linear(4, 2))
    seen: list[Tensor] = []
    with capture_inputs(layer, lambda site, rows: seen.append(rows)):
        layer(torch.ones(3, 5, 4))
        layer(input=torch.ones(4))
    layer(torch.ones(1, 4))
    assert [list(rows.shape) for rows in seen] == [[15, 4], [1, 4]]


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 6, "vdim": 6}])
def test_attentions_projections_are_seen_as_if_written_out(options: dict[str, bool | int]) -> None:
    """The last projection's inputs, times its matrix, are attention's output; the first's are its arguments."""
    attention = seeded(lambda: nn.MultiheadAttention(8, 2, **options)).eval()
    wide = int(options.get("kdim", 8))
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(5, 3, 8, generator=g), torch.randn(5, 3, wide, generator=g)
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad(), capture_inputs(attention, lambda site, rows: seen.setdefault(site.name, []).append(rows)):
        expected = attention(query, key, value=key, need_weights=False)[0]
    own = {site.name: site for site in sites(attention)}
    last = own["out_proj.weight"]
    made = torch.cat(seen["out_proj.weight"]) @ matrix(last, attention).T
    if attention.out_proj.bias is not None:
        made = made + attention.out_proj.bias
    assert torch.allclose(made.view_as(expected), expected, atol=1e-5)
    if wide == 8:
        assert [len(rows) for rows in seen["in_proj_weight"]] == [15, 15]  # key is value
        assert torch.equal(seen["in_proj_weight"][0], query.flatten(0, 1))
    else:
        assert torch.equal(seen["q_proj_weight"][0], query.flatten(0, 1))
        assert torch.equal(seen["v_proj_weight"][0], key.flatten(0, 1))


def test_a_transformers_fast_path_hides_nothing(digits: LabeledImages) -> None:
    """In eval mode without gradients torch would compute such a layer in one go."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x[:, 0]).mean(1)
            return out

    model, images = seeded(Encoder), digits.images[:4]
    assert rows_per_image(model, 1, 8, 8) == {
        "layer.self_attn.in_proj_weight": 8,
        "layer.self_attn.out_proj.weight": 8,
        "layer.linear1.weight": 8,
        "layer.linear2.weight": 8,
    }
    first = grams(model, images)["layer.self_attn.in_proj_weight"]
    tokens = to_float(images).flatten(0, 2).double()
    assert torch.allclose(first, tokens.T @ tokens)


def test_every_matrix_of_a_model_is_found_in_order(digits: LabeledImages) -> None:
    model = seeded(EveryLayer)
    names = [site.name for site in sites(model)]
    assert names == ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]
    model.get_parameter("head.weight").requires_grad_(False)
    assert [site.name for site in sites(model)] == names[:-1]


def test_grams_add_over_images_and_leave_the_model_as_it_was(digits: LabeledImages) -> None:
    model = seeded(EveryLayer).train()
    model.get_submodule("group").eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    whole, parts = grams(model, digits.images[:120]), [grams(model, digits.images[i : i + 60]) for i in (0, 60)]
    for name, gram in whole.items():
        assert gram.dtype == torch.float64
        assert torch.allclose(gram, parts[0][name] + parts[1][name], rtol=1e-9)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.get_submodule("group").training


def test_a_one_for_the_bias_and_a_limit_on_rows(digits: LabeledImages) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 3, bias=False))
    images = digits.images[:10]
    rows = F.pad(to_float(images).flatten(1).double(), (0, 1), value=1.0)
    assert torch.allclose(grams(model, images, bias=True)["1.weight"], rows.T @ rows)
    assert grams(model, images, bias=True)["2.weight"].shape == (5, 5)
    short = rows * (2 / rows.norm(dim=1, keepdim=True)).clamp(max=1)
    assert torch.allclose(grams(model, images, bias=True, max_norm=2)["1.weight"], short.T @ short)


def test_a_layer_that_is_never_called_has_no_rows(digits: LabeledImages) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.busy = nn.Linear(3, 3), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.busy(x.flatten(1))
            return out

    assert rows_per_image(Idle(), 1, 8, 8) == {"idle.weight": 0, "busy.weight": 1}
    seen: list[str] = []
    record_inputs(Idle(), digits.images[:2], lambda site, rows: seen.append(site.name))
    assert seen == ["busy.weight"]
