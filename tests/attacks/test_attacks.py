"""Every attack on a message that must leak to it; each is refused where its needs are not met."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attacks.accumulation import Accumulation
from attacks.base import ATTACKS, Attack, AttackError, Reconstruction, Watch, make_attack
from attacks.codec_aware import CodecAware, sent_entries, stretched
from attacks.dlg import Dlg
from attacks.gradinversion import GradInversion
from attacks.idlg import Idlg
from attacks.inverting import Inverting
from attacks.metrics import Scores, score
from attacks.networks import NAMES
from attacks.observation import CAPABILITIES, Observation
from attacks.simulation import Simulation
from tests.attacks.conftest import Look
from tofu.cli.attack import ATTACKED_MODELS
from tofu.data import LabeledImages, to_float
from tofu.errors import SettingError
from tofu.models import model_names


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(found: Reconstruction, truth: LabeledImages, others: LabeledImages) -> Scores:
    return score(found.images, found.labels, truth=to_float(truth.images), true_labels=truth.labels,
                 others=to_float(others.images), classes=truth.classes)  # fmt: skip


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("attack", [Dlg(), Idlg()])
def test_the_control_breaks(look: Look, attack: Attack, batch: int) -> None:
    seen, truth, others = look("exact", batch=batch)
    found = scores(attack.run(seen, generator=generator()), truth, others)
    assert found.psnr is not None
    assert found.psnr > 30
    assert found.labels == 1
    assert found.recovered == 1


def test_a_sum_of_single_images_leaks_like_a_batch(look: Look) -> None:
    """A secure round of few clients with few images hides who sent an image, not the image."""
    seen, truth, others = look("secure:3", batch=1)
    found = scores(Idlg().run(seen, generator=generator()), truth, others)
    assert found.psnr is not None
    assert found.psnr > 30


def test_analytic_recovery_is_exact_for_one_image(look: Look) -> None:
    seen, truth, others = look("exact", model="mlp")
    found = scores(make_attack("analytic").run(seen, generator=generator()), truth, others)
    assert found.psnr is not None
    assert found.psnr > 50


def test_analytic_recovery_of_a_batch_finds_images_that_switched_on_units_alone(look: Look) -> None:
    seen, truth, others = look("exact", model="mlp", batch=4)
    found = scores(make_attack("analytic").run(seen, generator=generator()), truth, others)
    assert found.recovered is not None
    assert found.recovered >= 0.5


def test_simulating_local_steps_inverts_them(look: Look) -> None:
    seen, truth, others = look("exact", batch=2, steps=3)
    assert Idlg().incompatibility(seen) is not None
    found = scores(Simulation(restarts=1, max_evals=100).run(seen, generator=generator()), truth, others)
    assert found.psnr is not None
    assert found.psnr > 30


def test_gradinversion_breaks_a_network_with_batchnorm(look: Look) -> None:
    seen, truth, others = look("exact", model="lenet-smooth-batch", batch=2)
    attack = GradInversion(seeds=1, max_evals=300)
    found = scores(attack.run(seen, generator=generator()), truth, others)
    assert found.psnr is not None
    assert found.psnr > 30
    assert seen.batch_statistics.keys() == {"norm1", "norm2", "norm3"}


def test_batch_statistics_are_those_of_the_batch(look: Look) -> None:
    seen, truth, _ = look("exact", model="cnn", norm="batch", batch=4)
    model = seen.network.model
    with torch.no_grad():
        maps = model.conv1(to_float(truth.images))  # type: ignore[operator]
    mean, variance = seen.batch_statistics["norm1"]
    assert torch.allclose(mean, maps.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(variance, maps.transpose(0, 1).flatten(1).var(1), atol=1e-4)


def test_a_well_encoded_update_leaks_to_the_codec_aware_attacker(look: Look) -> None:
    seen, truth, others = look("proxy:smooth:20")
    attack = CodecAware(restarts=2, max_evals=250)
    found = scores(attack.run(seen, generator=generator()), truth, others)
    hidden, _, _ = look("dp:1")
    noisy = scores(attack.run(hidden, generator=generator()), truth, others)
    assert found.psnr is not None
    assert noisy.psnr is not None
    assert found.psnr > noisy.psnr + 5


def test_sent_entries_are_those_of_the_correction(look: Look) -> None:
    proxy, _, _ = look("proxy:smooth:50")
    assert 0 < sum(int(s.sum()) for s in sent_entries(proxy)) < proxy.network.param_spec.parameter_count / 4
    paper, _, _ = look("proxy:paper:50")
    assert not any(bool(s.any()) for s in sent_entries(paper))
    topk, _, _ = look("topk:50")
    assert sum(int(s.sum()) for s in sent_entries(topk)) == sum(int((topk.update[n] != 0).sum()) for n in topk.update)


def test_proxies_are_stretched_to_the_input(look: Look) -> None:
    seen, _, _ = look("proxy:smooth:50")
    images = stretched(seen)
    assert images.shape[1:] == (1, 8, 8)
    assert torch.allclose(images.amin((1, 2, 3)), torch.tensor(-1.0))


def test_messages_about_the_same_images_are_matched_together(look: Look) -> None:
    first, truth, others = look("exact")
    attack = Accumulation(restarts=1, max_evals=100)
    assert attack.incompatibility(first) is not None
    found = scores(attack.run(replace(first, earlier=(first,)), generator=generator()), truth, others)
    assert found.psnr is not None
    assert found.psnr > 30


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_with_the_reason(look: Look, name: str) -> None:
    seen, _, _ = look("exact", model="lenet5", steps=2)
    blind: Observation = replace(seen, lr=None)
    attack = make_attack(name)
    lacking = [need for need in attack.needs if not CAPABILITIES[need][1](blind)]
    if not lacking:
        assert name == "label-signs"
        return
    with pytest.raises(AttackError, match=f"^{name} needs {lacking[0]}, which exact does not give: ") as caught:
        attack.run(blind, generator=generator())
    assert "\n" not in str(caught.value)


def test_an_unknown_attack_is_one_line() -> None:
    with pytest.raises(
        SettingError, match=r"attacks='ddlg' is not usable: expected one of .*\bdlg\b.*package.module:Class"
    ):
        make_attack("ddlg")


def test_a_watch_ends_an_attack_and_reports(look: Look) -> None:
    seen, _, _ = look("exact")
    now, calls = 0.0, []

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    watch = Watch(20, lambda done, planned, loss: calls.append((done, planned)), clock)
    found = Inverting(restarts=3, max_evals=500).run(seen, generator=generator(), watch=watch)
    assert 0 < found.evals < 30
    assert calls[0][1] == 500


def test_the_same_seed_finds_the_same(look: Look) -> None:
    seen, _, _ = look("exact")
    a, b = (Dlg(restarts=1, max_evals=15).run(seen, generator=generator(3)).images for _ in range(2))
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    assert torch.equal(a, b)


def test_the_command_line_knows_the_models_without_importing_them() -> None:
    assert set(ATTACKED_MODELS) == {*model_names(), *NAMES}
