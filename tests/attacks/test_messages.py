"""Messages are made by the run's own codecs, and misspelt ones are one line."""

import pytest
import torch

from attacks.messages import parse_message
from tests.attacks.conftest import Look
from tofu.errors import SettingError
from tofu.weights import dot, explained_variance


@pytest.mark.parametrize(
    "text",
    ["", "foo", "exact:1", "proxy", "proxy:100", "proxy:rough:100", "proxy:smooth:x", "proxy:smooth:0.5", "dp", "dp:0",
     "dp:nan", "dp:-1", "secure:1", "secure:2.5", "secure:inf", "none:3", "full:3", "topk:1:2"],
)  # fmt: skip
def test_what_is_no_message_is_one_line(text: str) -> None:
    with pytest.raises(SettingError, match=r"^messages='.*' is not usable: expected exact, proxy:smooth:RATIO"):
        parse_message(text)


def test_a_ratio_out_of_reach_is_one_line(look: Look) -> None:
    with pytest.raises(SettingError, match=r"^ratio="):
        look("proxy:smooth:100000")


def test_the_exact_update_of_one_step_is_the_gradient(look: Look) -> None:
    seen, truth, _ = look("exact", batch=2)
    model = seen.network.model
    loss = torch.nn.functional.cross_entropy(model((truth.images.float() / 255 - 0.5) / 0.5), truth.labels)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for grad, name in zip(grads, seen.network.param_spec.parameters, strict=True):
        assert torch.allclose(seen.gradient[name], grad, atol=2e-6)


def test_a_better_ratio_explains_less(look: Look) -> None:
    exact, _, _ = look("exact")
    kept = []
    for message in ("proxy:smooth:20", "proxy:smooth:400"):
        seen, _, _ = look(message)
        assert seen.proxies is not None
        kept.append((explained_variance(exact.update, seen.update), seen.payload_bytes))
    assert kept[0][0] > kept[1][0]
    assert kept[0][1] > 10 * kept[1][1]


def test_noise_hides_the_update_by_epsilon(look: Look) -> None:
    exact, _, _ = look("exact")
    apart = []
    for message in ("dp:1", "dp:1000"):
        seen, _, _ = look(message)
        difference = {name: seen.update[name] - value for name, value in exact.update.items()}
        apart.append(dot(difference, difference) / dot(exact.update, exact.update))
    assert apart[0] > 1000 * apart[1]
    assert apart[1] > 0


def test_a_sum_is_the_mean_and_counts_all_images(look: Look) -> None:
    seen, truth, _ = look("secure:3", batch=2)
    assert (seen.images, seen.batch_size, seen.steps, seen.clients) == (6, 6, 1, 3)
    whole, _, _ = look("exact", batch=6)
    assert explained_variance(whole.update, seen.update) > 0.9999
    assert len(truth) == 6
