import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import Case
from tofu.codec import compressor as module
from tofu.codec.compressor import ProxyCompressor
from tofu.codec.correction import strata_of
from tofu.codec.options import AUTOMATIC, CompressorOptions, ProxySettings, automatic_gain
from tofu.codec.search import TRIAL_EVALS
from tofu.compression import make_compressor, uplink_compressor
from tofu.compression.base import CompressedUpdate
from tofu.data import ImageShape
from tofu.errors import PayloadError, SettingError
from tofu.models import build_model
from tofu.reference_model import ReferenceModel
from tofu.settings import Settings
from tofu.weights import copy_model, explained_variance
from tofu.wire import HEADER_BYTES

QUICK = ProxySettings(max_evals=4, solve_labels=2)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def lenet() -> ReferenceModel:
    shape = ImageShape(1, 28, 28, 10)
    return ReferenceModel(build_model("lenet5", shape).eval(), shape)


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("ratio", [2, 10, 64, 250])
def test_the_payload_is_as_small_as_asked_and_no_smaller_than_needed(
    lenet: ReferenceModel, ratio: float, bits: int
) -> None:
    compressor = ProxyCompressor(lenet, ratio=ratio, options=CompressorOptions(encoder=ProxySettings(bits=bits)))
    limit = lenet.param_spec.float32_bytes / ratio
    size = HEADER_BYTES + compressor.body_bytes(lenet.param_spec)
    more = ProxyCompressor(
        lenet, ratio=1, options=CompressorOptions(proxies=compressor.count + 1, encoder=compressor.settings)
    )
    assert size <= limit < HEADER_BYTES + more.body_bytes(lenet.param_spec)


def test_lower_ratios_get_larger_proxies_not_only_more(lenet: ReferenceModel) -> None:
    sides = [ProxyCompressor(lenet, ratio=ratio).side for ratio in (10, 100, 500)]
    assert sides == [14, 11, 7]


def test_a_ratio_out_of_reach_says_what_is_in_reach(lenet: ReferenceModel) -> None:
    with pytest.raises(SettingError, match=r"ratio=100000 is not usable: expected at most 2\d\d\d\.\d"):
        ProxyCompressor(lenet, ratio=100_000)


def test_round_trip_with_buffers(every_layer_update: Case) -> None:
    network, update = every_layer_update
    compressor = ProxyCompressor(network, ratio=1, options=CompressorOptions(proxies=6, encoder=QUICK))
    compressed = compressor.compress(network, update, generator=generator())
    assert len(compressed.body) == compressor.body_bytes(network.param_spec)
    decoded = compressor.decompress(network, compressed.body)
    assert decoded.keys() == update.keys()
    assert all(torch.equal(decoded[name], compressed.decoded[name]) for name in decoded)
    for name in ("batch.running_mean", "batch.running_var"):
        assert torch.allclose(decoded[name], update[name], atol=float(update[name].abs().max()) / 100)
    assert torch.equal(decoded["batch.num_batches_tracked"], update["batch.num_batches_tracked"])


def test_memory_warms_the_next_call_and_foreign_memory_is_ignored(mlp_update: Case) -> None:
    network, update = mlp_update
    compressor = ProxyCompressor(
        network, ratio=1, options=CompressorOptions(proxies=6, encoder=ProxySettings(max_evals=3))
    )
    first = ProxyCompressor(network, ratio=1, options=CompressorOptions(proxies=6)).compress(
        network, update, generator=generator()
    )
    cold = compressor.compress(network, update, generator=generator())
    warm = compressor.compress(network, update, generator=generator(), memory=first.memory)
    foreign = compressor.compress(network, update, generator=generator(), memory=b"something else")

    def error(decoded: dict[str, torch.Tensor]) -> float:
        return sum(float((decoded[name] - update[name]).square().sum()) for name in network.param_spec.parameters)

    assert error(warm.decoded) < error(cold.decoded)
    assert foreign.body == cold.body


def test_bodies_of_other_settings_are_refused(mlp_update: Case) -> None:
    network, update = mlp_update
    compressor = ProxyCompressor(network, ratio=1, options=CompressorOptions(proxies=3, encoder=QUICK))
    body = compressor.compress(network, update, generator=generator()).body

    def incompatibility(data: bytes) -> str:
        with pytest.raises(PayloadError) as error:
            compressor.decompress(network, data)
        return str(error.value)

    assert "at least 6" in incompatibility(body[:3])
    assert "flags" in incompatibility(b"\x00" + body[1:])
    assert "bits 16, this run uses 8" in incompatibility(body[:1] + b"\x10" + body[2:])
    assert "count 65535, this run uses 3" in incompatibility(body[:2] + b"\xff\xff" + body[4:])
    assert "side" in incompatibility(body[:4] + struct.pack("<H", 60000) + body[6:])
    assert "proxies take" in incompatibility(body[:-60])
    assert "correction has 1 bytes" in incompatibility(body + b"\0")


@pytest.mark.parametrize("ratio", [20.0, 60.0])
def test_a_correction_sends_what_the_proxies_missed(every_layer_update: Case, mlp_update: Case, ratio: float) -> None:
    """More than the same proxies alone, and than no proxies in the same bytes; both ends agree to the bit."""
    for network, update in (mlp_update, every_layer_update):
        explained: dict[float, float] = {}
        try:
            count = ProxyCompressor(network, ratio=ratio, options=CompressorOptions(correction=0.4)).count
        except SettingError:  # too small a network
            continue
        if not count:  # a network that small has bytes for the correction alone
            assert network is every_layer_update[0]
            continue
        for share in (0.0, 0.4, 1.0):
            compressor = ProxyCompressor(
                network, ratio=ratio, options=CompressorOptions(proxies=count, correction=share)
            )
            compressed = compressor.compress(network, update, generator=generator())
            decoded = compressor.decompress(network, compressed.body)
            assert all(torch.equal(decoded[name], compressed.decoded[name]) for name in update)
            assert len(compressed.body) <= compressor.body_bytes(network.param_spec)
            assert HEADER_BYTES + compressor.body_bytes(network.param_spec) <= network.param_spec.float32_bytes / ratio
            assert (compressor.correction > 0) == (share > 0)
            parameters = {name: update[name] for name in network.param_spec.parameters}
            explained[share] = explained_variance(parameters, decoded)
        assert explained[0.4] > explained[0.0]
        assert explained[0.4] >= explained[1.0]


def test_a_payload_without_proxies_where_they_explain_less_and_the_client_keeps_to_it(mlp_update: Case) -> None:
    """An update of a few entries is no gradient of any image: until the next trial no proxy is looked for."""
    network, _ = mlp_update
    update = {name: torch.zeros_like(w) for name, w in network.base.items()}
    for value in update.values():
        value.view(-1)[:3] = 1.0
    compressor = ProxyCompressor(
        network, ratio=40, options=CompressorOptions(correction=0.4, encoder=ProxySettings(max_evals=8))
    )
    memory, max_evals = b"", []
    for _ in range(5):
        made = compressor.compress(network, update, generator=generator(), memory=memory)
        assert compressor.describe(made.body).proxies is None
        decoded = compressor.decompress(network, made.body)
        assert all(torch.equal(decoded[name], update[name]) for name in update)
        memory = made.memory
        max_evals.append(made.evals)
    assert [count > 0 for count in max_evals] == [True, False, False, False, True]


def test_no_search_where_the_correction_alone_explains_enough(mlp_update: Case) -> None:
    """What follows from error feedback: the rest of the update arrives later. The last proxies are kept meanwhile."""
    network, update = mlp_update

    def compressor(below: float) -> ProxyCompressor:
        return ProxyCompressor(
            network,
            ratio=100,
            options=CompressorOptions(correction=0.4, proxies_below=below, encoder=ProxySettings(max_evals=20)),
        )

    alone = ProxyCompressor(network, ratio=100, options=CompressorOptions(correction=1.0)).compress(
        network, update, generator=generator()
    )
    explained = explained_variance({name: update[name] for name in network.param_spec.parameters}, alone.decoded)
    assert 0.1 < explained < 0.9
    always, searched = (compressor(below).compress(network, update, generator=generator()) for below in (1.0, 0.99))
    assert always.body == searched.body
    assert always.evals > 0
    enough = compressor(explained - 0.01)
    sent = enough.compress(network, update, generator=generator(), memory=always.memory)
    assert sent.evals == 0
    assert enough.describe(sent.body).proxies is None
    received = enough.decompress(network, sent.body)
    assert all(torch.equal(received[name], alone.decoded[name]) for name in update)
    assert sent.memory[1:] == always.memory[1:] != b""
    strict = compressor(explained + 0.01).compress(network, update, generator=generator(), memory=sent.memory)
    tried = compressor(1.0).compress(network, update, generator=generator(), memory=b"\x03" + always.memory[1:])
    assert strict.body == tried.body  # a trial of both bodies


@pytest.mark.parametrize(
    ("settings", "below"),
    [({}, 0.33), ({"proxies_below": 0.5}, 0.5), ({"error_feedback": 0.0}, 1.0), ({"noise_multiplier": 1.0}, 1.0)],
)
def test_what_is_missed_must_not_be_lost_to_save_a_search(
    lenet: ReferenceModel, settings: dict[str, float], below: float
) -> None:
    compressor = uplink_compressor(Settings.of({"ratio": 100.0} | settings), "compressed", lenet)
    assert isinstance(compressor, ProxyCompressor)
    assert compressor._options.proxies_below == below


def test_no_proxies_at_all(mlp_update: Case) -> None:
    network, update = mlp_update
    compressor = ProxyCompressor(network, ratio=100, options=CompressorOptions(correction=1.0, encoder=QUICK))
    made = compressor.compress(network, update, generator=generator())
    assert (compressor.count, made.evals) == (0, 0)
    assert explained_variance(update, made.decoded) > 0.1
    with pytest.raises(SettingError, match=r"ratio=1000000.0 is not usable: expected at most \d+\.\d .*one entry"):
        ProxyCompressor(network, ratio=1e6, options=CompressorOptions(correction=1.0, encoder=QUICK))


def test_ends_that_began_elsewhere_find_out(mlp_update: Case) -> None:
    """The correction's places depend on the initial weights: other ones must not put entries elsewhere."""
    network, update = mlp_update
    compressor = ProxyCompressor(network, ratio=100, options=CompressorOptions(correction=0.4, encoder=QUICK))
    body = compressor.compress(network, update, generator=generator()).body
    generator_ = generator()
    initial = {name: w + torch.randn(w.shape, generator=generator_) for name, w in network.base.items()}
    with pytest.raises(PayloadError, match="the weights, or the initial weights, differ"):
        compressor.decompress(replace(network, initial=initial), body)


def test_strata_are_computed_once_for_all_bodies_at_the_same_weights(
    mlp_update: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server decodes many bodies in a round; between rounds it changes the weights in place."""
    built, update = mlp_update
    network = replace(built, model=copy_model(built.model)).as_built()
    calls: list[ReferenceModel] = []
    monkeypatch.setattr(module, "strata_of", lambda reference: calls.append(reference) or strata_of(reference))
    client, server = (ProxyCompressor(network, ratio=100, options=CompressorOptions(correction=1.0)) for _ in range(2))
    for round_ in range(2):
        sent = client.compress(network, update, generator=generator())
        calls.clear()
        for _ in range(3):
            decoded = server.decompress(network, sent.body)
            assert all(torch.equal(decoded[name], value) for name, value in sent.decoded.items())
        assert len(calls) == 1, round_
        with torch.no_grad():
            for weight in network.model.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator()))
    body = client.compress(network, update, generator=generator()).body
    server.decompress(network, body)
    with pytest.raises(PayloadError, match="the weights, or the initial weights, differ"):
        server.decompress(network.as_built(), body)


def test_a_correction_that_cannot_have_been_written_is_refused(mlp_update: Case) -> None:
    network, update = mlp_update
    compressor = ProxyCompressor(network, ratio=40, options=CompressorOptions(correction=0.4, encoder=QUICK))
    body = compressor.compress(network, update, generator=generator()).body
    for bad in (body[:-1], body[: len(body) - compressor.correction], body + bytes(2)):
        with pytest.raises(PayloadError):
            compressor.decompress(network, bad)


def test_where_one_proxy_takes_the_whole_there_is_no_correction(mlp_update: Case) -> None:
    network, _ = mlp_update
    with pytest.raises(SettingError) as error:
        ProxyCompressor(network, ratio=1e6, options=CompressorOptions(encoder=ProxySettings(size=8)))
    most = float(error.value.accepted.split()[2])
    compressor = ProxyCompressor(
        network, ratio=most - 0.1, options=CompressorOptions(correction=0.4, encoder=ProxySettings(size=8))
    )
    assert (compressor.count, compressor.correction) == (1, 0)


def test_the_sharpness_is_tried_anew_every_fourth_time(mlp_update: Case) -> None:
    network, update = mlp_update
    compressor = ProxyCompressor(
        network, ratio=1, options=CompressorOptions(proxies=4, encoder=ProxySettings(max_evals=60, tolerance=0.0))
    )
    memory, max_evals = b"", []
    for _ in range(6):
        compressed = compressor.compress(network, update, generator=generator(), memory=memory)
        memory = compressed.memory
        max_evals.append(compressed.evals)
    tried = [count >= 60 + TRIAL_EVALS for count in max_evals]
    assert tried == [True, False, False, False, True, False]


def test_full_is_the_update_itself(every_layer_update: Case) -> None:
    network, update = every_layer_update
    full = make_compressor("none", network, ratio=1)
    compressed = full.compress(network, update, generator=generator())
    assert len(compressed.body) == network.param_spec.float32_bytes
    decoded = full.decompress(network, compressed.body)
    assert all(torch.equal(decoded[name], update[name]) for name in update)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(
        SettingError, match=r"compressor='zip' is not usable: expected one of .*proxy.*package.module:Class"
    ):
        make_compressor("zip", ReferenceModel(torch.nn.Linear(2, 2), ImageShape(1, 1, 2, 2)), ratio=1)


def test_an_automatic_gain_is_in_the_magnitudes_of_the_correction(mlp_update: Case) -> None:
    network, update = mlp_update

    def compress(correction_gain: float) -> tuple[ProxyCompressor, CompressedUpdate]:
        compressor = ProxyCompressor(
            network, ratio=20, options=CompressorOptions(correction=1.0, correction_gain=correction_gain)
        )
        return compressor, compressor.compress(network, update, generator=generator())

    (plain, one), (relaxed, other) = compress(1.0), compress(AUTOMATIC)
    assert len(one.body) == len(other.body)
    received = relaxed.decompress(network, other.body)
    assert all(torch.equal(received[name], other.decoded[name]) for name in update)
    gain = automatic_gain(explained_variance(update, one.decoded))
    assert 1 < gain < 1.8
    for name in network.param_spec.parameters:
        assert torch.allclose(received[name], gain * one.decoded[name], rtol=2**-7)  # bfloat16 magnitudes
    # A receiver with a gain of 1 decodes the same: the bytes have all that it needs.
    assert all(torch.equal(value, received[name]) for name, value in plain.decompress(network, other.body).items())


def test_a_gain_applies_to_the_correction_at_both_ends(mlp_update: Case) -> None:
    """The body is the same; the correction counts correction_gain times, and the proxies once."""
    network, update = mlp_update

    def compress(gain: float) -> tuple[bytes, dict[str, torch.Tensor]]:
        options = CompressorOptions(correction=0.4, correction_gain=gain, encoder=ProxySettings(size=4))
        compressor = ProxyCompressor(network, ratio=20, options=options)
        compressed = compressor.compress(network, update, generator=generator())
        received = compressor.decompress(network, compressed.body)
        assert all(torch.equal(received[name], compressed.decoded[name]) for name in update)
        return compressed.body, received

    (body, plain), (same, half), (also, whole) = compress(1.0), compress(1.25), compress(1.5)
    assert body == same == also
    for name in network.param_spec.parameters:
        assert torch.allclose(plain[name] + whole[name], 2 * half[name], atol=1e-6)
    changed = torch.cat([(whole[name] != plain[name]).flatten() for name in network.param_spec.parameters])
    assert 0 < float(changed.float().mean()) < 1  # where the correction has no entry, there are proxies alone


@pytest.mark.parametrize("correction", [0.0, 0.4, 1.0])
def test_describe_accounts_for_every_byte(mlp_update: Case, correction: float) -> None:
    network, update = mlp_update
    compressor = ProxyCompressor(network, ratio=40, options=CompressorOptions(correction=correction, encoder=QUICK))
    planned = compressor.describe()
    assert sum(planned.parts.values()) == compressor.body_bytes(network.param_spec)
    assert planned.proxy_shape[0] == compressor.count
    body = compressor.compress(network, update, generator=generator()).body
    content = compressor.describe(body)
    assert sum(content.parts.values()) == len(body)
    assert (content.proxies is None) == (content.proxy_shape[0] == 0)
    if content.proxies is not None:
        assert tuple(content.proxies.inputs[0].shape) == content.proxy_shape


PEAK = """
import torch
from torch import nn
from tofu.compression import make_compressor
from tofu.data import ImageShape
from tofu.reference_model import ReferenceModel

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3000), nn.ReLU(), nn.Linear(3000, 10))
reference = ReferenceModel(model.eval(), ImageShape(3, 32, 32, 10))
update = {name: 0.01 * torch.randn_like(weight) for name, weight in reference.base.items()}
compressor = make_compressor("sparse", reference, ratio=200.0)
before = peak()
compressor.compress(reference, update, generator=torch.Generator().manual_seed(0))
print((peak() - before) / reference.param_spec.float32_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_correction_takes_the_memory_of_a_few_updates() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 6.5
