"""Estimates of the bytes and the time of a run. The time is extrapolated from measured training steps and an encode."""

import dataclasses
import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from tofu.codec.compressor import TRIAL_INTERVAL, ProxyCompressor
from tofu.codec.search import SURROGATE_BETAS, TRIAL_EVALS
from tofu.compression import downlink_compressor, payload_notes, uplink_compressor
from tofu.data import LabeledImages
from tofu.errors import SettingError
from tofu.privacy import Accountant
from tofu.privacy.correlated import Participation
from tofu.privacy.noise import Noise
from tofu.reference_model import ReferenceModel
from tofu.secagg import coordinates
from tofu.secagg.encoding import FEW_LEVELS, EncodingConfig, RingEncoder, first_ranges
from tofu.secagg.fixed_point import FixedPoint
from tofu.secagg.graph import DIGEST_BYTES, SESSION_BYTES, Session, Terms, Topology
from tofu.secagg.identities import SIGNATURE_BYTES
from tofu.secagg.masks import KEY_BYTES
from tofu.secagg.messages import SEALED_BYTES, Advert, Confirmation, Masked, Reveal, Roster, Shares, Survivors
from tofu.secagg.shamir import SHARE_BYTES
from tofu.settings import MIN_SECURE, Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, copy_model, difference, weights_of
from tofu.wire import HEADER_BYTES, SecurePart

SLOW_ENCODE = 50_000
"""Number of forward and backward passes over one image from which an encode is reported as slow."""


@dataclass(frozen=True)
class Plan:
    """Bytes of one client's messages and of the whole run.

    Attributes:
        parameters: trainable numbers of the model.
        proxies, proxy_side: how many proxies a compressed round sends and their side in pixels (0 for other codecs).
        update_bytes: an update as float32, without any header.
        payload_bytes: the compressed payload, header included; 0 without compressed rounds.
        secure_bytes: what one client sends in all stages of a secure round; 0 without secure rounds.
        message_overhead: bytes that Flower's message adds to a payload.
        compressed_rounds, fedavg_rounds, secure_rounds: numbers of rounds ("plateau": all compressed).
        uplink_bytes, downlink_bytes: sizes of all messages of the run.
        fedavg_uplink_bytes: uplink of the same rounds with float32 updates, equal to the downlink.
        step_bytes: the payload of the server's step, header included; 0 where the downlink is not compressed.
        warnings: one line each.
    """

    parameters: int
    proxies: int
    proxy_side: int
    update_bytes: int
    payload_bytes: int
    secure_bytes: int
    message_overhead: int
    compressed_rounds: int
    fedavg_rounds: int
    secure_rounds: int
    uplink_bytes: int
    downlink_bytes: int
    fedavg_uplink_bytes: int
    step_bytes: int
    warnings: tuple[str, ...]

    @property
    def payload_ratio(self) -> float:
        """How much larger an update is than a payload; 0 without compressed rounds."""
        return self.update_bytes / self.payload_bytes if self.payload_bytes else 0.0

    @property
    def uplink_ratio(self) -> float:
        return self.fedavg_uplink_bytes / self.uplink_bytes

    @property
    def both_ratio(self) -> float:
        return 2 * self.fedavg_uplink_bytes / (self.uplink_bytes + self.downlink_bytes)


def make_plan(
    settings: Settings, network: ReferenceModel, *, fedavg_rounds: int, message_overhead: int, secure_rounds: int = 0
) -> Plan:
    """Plan a run.

    Args:
        network: as the run will build it.
        fedavg_rounds: rounds that send float32 updates.
        message_overhead: bytes that a message adds to its payload.
        secure_rounds: number of secure rounds.

    Raises:
        SettingError: the ratio is out of reach for this model.
    """
    param_spec = network.param_spec
    compressed_rounds = settings.training.rounds - fedavg_rounds - secure_rounds
    payload, proxies, side = _payload(settings, network) if compressed_rounds else (0, 0, 0)
    full = HEADER_BYTES + param_spec.float32_bytes
    clients = asked_clients(settings)
    uplink = clients * (compressed_rounds * (payload + message_overhead) + fedavg_rounds * (full + message_overhead))
    step, downlink = _downlink(settings, network, fedavg_rounds=fedavg_rounds, message_overhead=message_overhead)
    up = 0
    if secure_rounds:
        up, down = _secure_extra(settings, network, clients, message_overhead=message_overhead)
        uplink += clients * secure_rounds * up
        downlink += secure_rounds * down
    passes = 2 * settings.codec.max_evals * proxies
    return Plan(
        parameters=param_spec.parameter_count,
        proxies=proxies,
        proxy_side=side,
        update_bytes=param_spec.float32_bytes,
        payload_bytes=payload,
        secure_bytes=up,
        message_overhead=message_overhead,
        compressed_rounds=compressed_rounds,
        fedavg_rounds=fedavg_rounds,
        secure_rounds=secure_rounds,
        uplink_bytes=uplink,
        downlink_bytes=clients * downlink,
        fedavg_uplink_bytes=clients * settings.training.rounds * (full + message_overhead),
        step_bytes=step,
        warnings=(*payload_notes(settings, network), *_warnings(passes, payload, full, message_overhead))
        if compressed_rounds
        else (),
    )


def _payload(settings: Settings, network: ReferenceModel) -> tuple[int, int, int]:
    """Return the bytes of a compressed payload, the number of its proxies, and their side (0 for other codecs).

    Raises:
        SettingError: the ratio is out of reach for this model.
    """
    compressor = uplink_compressor(settings, "compressed", network)
    content = compressor.describe()
    proxies, *proxy = content.proxy_shape if content else (0,)
    return HEADER_BYTES + compressor.body_bytes(network.param_spec), proxies, min(proxy[1:], default=0)


def _warnings(passes: int, payload: int, full: int, message_overhead: int) -> tuple[str, ...]:
    """Warnings about compressed rounds, of the sizes in bytes and the forward and backward passes of an encode."""
    if payload >= full:
        return (
            f"a payload of {payload} bytes is no smaller than the update of {full}: "
            "use fewer or smaller proxies, or schedule=fedavg",
        )
    warnings = []
    if message_overhead > payload:
        warnings.append(
            f"Flower's {message_overhead} bytes a message outweigh the payload of {payload}: "
            "a higher ratio saves little more"
        )
    if passes > SLOW_ENCODE:
        warnings.append(
            f"one encode costs about as much as training on {passes:,} images: "
            "a higher ratio, larger proxies or fewer max_evals cost less"
        )
    return tuple(warnings)


def _secure_extra(
    settings: Settings, network: ReferenceModel, clients: int, *, message_overhead: int
) -> tuple[int, int]:
    """Return bytes that one client sends, and receives in addition to the weights, in one secure round.

    They are measured on messages with zeros for keys, shares and the masked vector.
    """
    members = max(clients, MIN_SECURE)
    topology = Topology.of(settings.secure, members)
    fraction, bits = coordinates.settings_for(settings.secure.secure_ratio, members)
    nearest = FixedPoint(members, bits, 1.0).levels < FEW_LEVELS and settings.residual_fraction == 1
    terms = EncodingConfig(members, bits, 1.0, first_ranges(network.param_spec, {}), fraction, nearest_rounding=nearest)
    displacement = torch.zeros(network.param_spec.float32_bytes // 4) if fraction < 1 else None
    length = RingEncoder(network.param_spec, terms, None, displacement).length
    signature = bytes(SIGNATURE_BYTES if settings.secure.secure_identities else 0)
    session, peers = Session(1, bytes(SESSION_BYTES)), range(topology.neighbors)
    advert = Advert("0" * len(str(members - 1)), bytes(KEY_BYTES), bytes(KEY_BYTES), signature)
    shape = (topology.threshold, bits, length, topology.neighbors)
    roster = Roster(0, Terms(session, *shape, (bytes(DIGEST_BYTES),) * members), (advert,) * topology.neighbors)
    shares = Shares(session, 0, dict.fromkeys(peers, bytes(SEALED_BYTES)))
    survivors = Survivors(session, (True,) * members)
    masked = Masked(session, 0, bytes((length * bits + 7) // 8))
    reveal = Reveal(session, 0, dict.fromkeys(peers, (True, bytes(SHARE_BYTES))))
    up = [shares.to_bytes(), masked.to_bytes(), reveal.to_bytes()]
    down = [roster.to_bytes(), survivors.to_bytes()]
    if settings.secure.secure_identities:
        up.append(Confirmation(session, 0, signature).to_bytes())
        down.append(Survivors(session, (True,) * members, dict.fromkeys(peers, signature), 0).to_bytes())
    train = SecurePart(terms.to_bytes(), shares.to_bytes()).to_bytes()
    sent = sum(len(message) + message_overhead for message in up) + len(advert.to_bytes())
    return sent, len(train) + sum(len(message) + message_overhead for message in down)


def _downlink(
    settings: Settings, network: ReferenceModel, *, fedavg_rounds: int, message_overhead: int
) -> tuple[int, int]:
    """Return bytes of a step's payload (0 for none), and of the downlink messages to one client
    that is asked in every round.

    A client that is sampled in a fraction f of the rounds has missed 1 / f steps on average.
    """
    whole = HEADER_BYTES + network.param_spec.float32_bytes
    compressor = downlink_compressor(settings, network)
    if compressor is None:
        return 0, settings.training.rounds * (whole + message_overhead)
    step = HEADER_BYTES + compressor.body_bytes(network.param_spec)
    payloads = fedavg_rounds * whole
    for round_ in range(1, settings.training.rounds - fedavg_rounds + 1):
        lacked = min(round_ - 1, round(1 / settings.server.client_fraction))
        payloads += min(whole, lacked * step)
    return step, payloads + settings.training.rounds * message_overhead


@dataclass(frozen=True)
class PlannedPrivacy:
    """What a run spends of its privacy budget.

    Attributes:
        epsilon: after the last round that the budget allows, against the server; infinite if the server adds the noise.
        model_epsilon: the same against those who see the models only.
        delta: of the guarantee.
        private_rounds: number of rounds that the budget allows.
        max_epsilon: the budget; 0 is no limit.
    """

    epsilon: float
    model_epsilon: float
    delta: float
    private_rounds: int
    max_epsilon: float

    @property
    def stop(self) -> str:
        """Why the run stops before its last round."""
        exceeded = f"the next one would exceed max-epsilon {self.max_epsilon:g}"
        return f"the run stops after round {self.private_rounds}: {exceeded}"


def planned_privacy(settings: Settings) -> PlannedPrivacy | None:
    """Return what a run spends; None without noise.

    Raises:
        SettingError: the budget does not allow one round.
    """
    privacy, clients = settings.privacy, settings.data.clients
    if not privacy.noise_multiplier:
        return None
    by_server = privacy.server_noise != "none"
    sample = (min(asked_clients(settings), clients), clients) if privacy.secret_sampling else ()
    account, rule, allowed = Accountant(privacy.privacy_delta), Participation(privacy.min_separation), 0
    while allowed < settings.training.rounds:
        spends = not by_server or rule.may_return
        if spends and privacy.max_epsilon and not account.allows(privacy.noise_multiplier, privacy.max_epsilon):
            break
        if spends:
            account.spend(privacy.noise_multiplier, "secure", *sample)
        rule.begin(())
        allowed += 1
    if not allowed:
        first = account.spend(privacy.noise_multiplier, "secure")
        raise SettingError("max-epsilon", privacy.max_epsilon, f"at least {first:.4g}, the epsilon of one round")
    against_server = math.inf if by_server else account.epsilon
    model = account.model_epsilon if privacy.secret_sampling else account.epsilon
    return PlannedPrivacy(against_server, model, privacy.privacy_delta, allowed, privacy.max_epsilon)


def asked_clients(settings: Settings) -> int:
    """Return the number of clients that are asked in a round."""
    return max(settings.server.min_clients, round(settings.server.client_fraction * settings.data.clients), 1)


_TIMED_BATCHES = 16
_TIMED_SECONDS = 2.0
"""Time to spend on training steps, and on an encode, before the rest is extrapolated."""
_TIMED_VALUES = 20_000
"""Maximum number of values for which noise is drawn."""
_SHORT_EVALS = (2, 6)
"""Evaluations of two short encodes, whose difference is what an evaluation costs."""


@dataclass(frozen=True)
class PlannedSeconds:
    """Estimated time of a run on this machine, in seconds of wall clock.

    Evaluation, plugins, messages and the masks of secure rounds are not counted. Encodes of later rounds may take
    longer or shorter; those of a large model are counted with all evaluations that a search may take, and many searches
    stop earlier.

    Attributes:
        training: local training of all clients in all rounds.
        encoding: their encodes, if all of them search for proxies.
        least_encoding: their encodes, if the correction alone explains enough everywhere.
        noise: drawing the noise of differential privacy.
    """

    training: float
    encoding: float
    least_encoding: float
    noise: float

    @property
    def total(self) -> float:
        return self.training + self.encoding + self.noise

    @property
    def least(self) -> float:
        return self.training + self.least_encoding + self.noise


def estimate_seconds(
    settings: Settings, network: ReferenceModel, data: LabeledImages, *, images: int, compressed_rounds: int
) -> PlannedSeconds:
    """Train on the first batches of a client, encode the update, and multiply.

    Args:
        network: as the run will build it.
        data: the images of one client.
        images: number of training images of all clients.
        compressed_rounds: number of rounds with an encode per client.
    """
    training = settings.training
    torch.set_num_threads(settings.run.threads)
    asked = asked_clients(settings)
    parallel = min(settings.run.workers, asked)
    per_image, update = _train(settings, network, data)
    trained = images * asked / settings.data.clients * training.local_epochs
    encode = least = 0.0
    if compressed_rounds:
        encode = least = _encode_seconds(settings, network, update)
        if settings.codec.compressor == "proxy" and 0 < settings.codec.correction < 1 > settings.codec.proxies_below:
            least = min(encode, _encode_seconds(settings.replace(correction=1.0), network, update))
    encodes = compressed_rounds * asked / parallel
    draws = training.rounds * (asked / parallel if settings.privacy.client_multiplier else 1)
    return PlannedSeconds(
        training=training.rounds * trained * per_image / parallel,
        encoding=encodes * encode,
        least_encoding=encodes * least,
        noise=draws * _noise_seconds(settings, network),
    )


def _noise_seconds(settings: Settings, network: ReferenceModel) -> float:
    """Return the seconds in which one party draws the noise of a round; 0 without noise."""
    if not settings.privacy.noise_multiplier:
        return 0.0
    values = network.param_spec.float32_bytes // 4
    some = np.zeros(min(values, _TIMED_VALUES))
    noise = Noise(1.0, settings.privacy.noise_multiplier)
    began = time.perf_counter()
    noise.steps(some)
    return (time.perf_counter() - began) * values / some.size


def _train(settings: Settings, network: ReferenceModel, data: LabeledImages) -> tuple[float, Weights]:
    """Return the seconds per image of local training, and the update that some batches make.

    The first image is not counted. A first batch decides how many more are trained on.
    """
    config = dataclasses.replace(LocalTrainingConfig.of(settings.training, 1), epochs=1)

    def trained(images: int) -> tuple[float, int, Weights]:
        model, some = copy_model(network.model), data.subset(torch.arange(min(len(data), images)))
        generator = torch.Generator().manual_seed(settings.run.seed)
        seconds = train_locally(model, some, config, generator=generator).seconds
        return seconds, len(some), difference(weights_of(model), weights_of(network.model))

    trained(1)
    seconds, images, update = trained(config.batch_size)
    batches = min(_TIMED_BATCHES, int(_TIMED_SECONDS / max(seconds, 1e-9)))
    if batches > 1:
        seconds, images, update = trained(batches * config.batch_size)
    return seconds / images, update


def _encode_seconds(settings: Settings, network: ReferenceModel, update: Weights) -> float:
    """Return the seconds of an encode that searches: measured, or extrapolated from two brief searches."""

    compressor = uplink_compressor(settings.replace(proxies_below=1.0), "compressed", network)

    def encode() -> tuple[float, int]:
        began = time.perf_counter()
        made = compressor.compress(network, update, generator=torch.Generator().manual_seed(settings.run.seed))
        return time.perf_counter() - began, made.evals

    few, more = _SHORT_EVALS
    if isinstance(compressor, ProxyCompressor) and compressor.count and compressor.settings.max_evals > more:
        whole = compressor.settings
        compressor.settings = dataclasses.replace(whole, max_evals=few)
        short, fewer = encode()
        compressor.settings = dataclasses.replace(whole, max_evals=more)
        longer, evals = encode()
        trials = whole.smooth and not whole.surrogate_beta and whole.max_evals >= 2 * TRIAL_EVALS
        tried = (len(SURROGATE_BETAS) - 1) * TRIAL_EVALS / TRIAL_INTERVAL if trials else 0.0
        per_eval = max(longer - short, 0.0) / max(evals - fewer, 1)
        seconds = short + per_eval * (whole.max_evals - few + tried)
        if seconds > _TIMED_SECONDS:
            return seconds
        compressor.settings = whole
    return encode()[0]
