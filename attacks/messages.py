"""The messages under attack, made from a client's real local round by the code that a run uses.

    exact                 the float32 update, as FedAvg sends it: the control of every attack
    proxy:MODE:RATIO      proxies by the codec, MODE smooth or paper
    NAME[:RATIO]          another compressor of `tofu.compression` (topk, stc, powersgd, signsgd, ...)
    dp:EPSILON            clipped to its own norm and given Gaussian noise, delta 1e-5
    secure:CLIENTS        the mean of so many clients' exact updates, which is all that a secure round shows

The noise of dp:EPSILON is for a client that takes part in one round. Error feedback is off: every message is about this
round alone.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.observation import Observation
from tofu.compression import compressors, uplink_compressor
from tofu.data import LabeledImages
from tofu.errors import SettingError
from tofu.privacy import Noise, check_param_spec, clip, noise_multiplier_for
from tofu.reference_model import ReferenceModel
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, difference, dot, weights_of
from tofu.wire import HEADER_BYTES

DELTA = 1e-5

ACCEPTED = "exact, proxy:smooth:RATIO, proxy:paper:RATIO, COMPRESSOR[:RATIO], dp:EPSILON or secure:CLIENTS"


@dataclass(frozen=True)
class ClientRound:
    """One client's local training, which no server observes.

    Attributes:
        network: at the base weights.
        data: the images that it trained on.
        config: settings of the local training.
        update: new minus old weights.
    """

    network: ReferenceModel
    data: LabeledImages
    config: LocalTrainingConfig
    update: Weights


def local_round(
    network: ReferenceModel, data: LabeledImages, config: LocalTrainingConfig, generator: torch.Generator
) -> ClientRound:
    """Train a copy of the network as a client does."""
    model = copy.deepcopy(network.model)
    base = weights_of(model)
    train_locally(model, data, config, generator=generator)
    return ClientRound(network, data, config, difference(weights_of(model), base))


@dataclass(frozen=True)
class Message:
    """A kind of message, read from its text by `parse_message`.

    Attributes:
        text: as the user wrote it.
        kind: "exact", "dp", "secure" or the name of a compressor.
        mode: mode of the proxy codec.
        number: ratio, epsilon or clients.
    """

    text: str
    kind: str
    mode: str
    number: float

    @property
    def clients(self) -> int:
        """Number of clients whose updates the message contains."""
        return int(self.number) if self.kind == "secure" else 1


def parse_message(text: str) -> Message:
    """Read a kind of message.

    Raises:
        SettingError: it is none of `ACCEPTED`.
    """
    kind, *rest = text.strip().split(":")
    mode = "smooth"
    if kind == "proxy" and rest:
        mode, *rest = rest
    wanted = {"exact": (0, 0), "dp": (1, 1), "secure": (1, 1), "proxy": (1, 1)}.get(kind, (0, 1))
    known = kind in ("exact", "dp", "secure") or (kind in compressors.names() and kind != "none")
    try:
        number = float(rest[0]) if rest else 1.0
    except ValueError:
        number = math.nan
    whole = kind != "secure" or (number == number // 1 and 2 <= number <= 1000)
    positive = 0 < number < math.inf and (number >= 1 or kind == "dp")
    if not (known and wanted[0] <= len(rest) <= wanted[1] and mode in ("smooth", "paper") and positive and whole):
        raise SettingError("messages", text, ACCEPTED)
    return Message(text.strip(), kind, mode, number)


def observe(
    message: Message, rounds: Sequence[ClientRound], *, generator: torch.Generator, know_labels: bool = False
) -> Observation:
    """Return the server's observation if the first of `rounds` (in a secure sum,
    the first few) is sent as this message.

    Args:
        generator: the codec's generator. Noise of differential privacy comes from the operating system, as in a run.
        know_labels: whether the attacker knows the labels.

    Raises:
        SettingError: the message cannot be made for this model (a ratio out of reach).
    """
    own = rounds[0]
    network, update, proxies, proxy_settings = own.network, own.update, None, None
    nbytes = HEADER_BYTES + network.param_spec.float32_bytes
    labels = torch.cat([one.data.labels for one in rounds[: message.clients]])
    if message.kind == "dp":
        update = _noised(network, update, message.number)
    elif message.kind == "secure":
        if len(rounds) < message.clients:
            raise SettingError("messages", message.text, f"at most the {len(rounds)} clients there are")
        update = _mean([one.update for one in rounds[: message.clients]])
    elif message.kind != "exact":
        wanted = {"compressor": message.kind, "ratio": message.number, "codec_mode": message.mode}
        wanted["proxies_below"] = 1.0  # what these messages are named after
        compressor = uplink_compressor(Settings.of(wanted), "compressed", network)
        compressed = compressor.compress(network, update, generator=generator)
        update, nbytes = compressed.decoded, HEADER_BYTES + len(compressed.body)
        if (content := compressor.describe(compressed.body)) is not None:
            proxies, proxy_settings = content.proxies, content.settings
    return Observation(
        message=message.text,
        network=network,
        update=update,
        images=len(labels),
        # A mean of updates over equally many images is, for one step, the update over all of them.
        batch_size=min(own.config.batch_size, len(own.data)) * message.clients,
        epochs=own.config.epochs,
        lr=own.config.lr,
        labels=labels if know_labels else None,
        proxies=proxies,
        proxy_settings=proxy_settings,
        payload_bytes=nbytes,
        clients=message.clients,
    )


def _noised(network: ReferenceModel, update: Weights, epsilon: float) -> Weights:
    """Return the update, clipped to its own norm and with the whole noise,
    as in a compressed round with differential privacy.
    """
    check_param_spec(network.param_spec)
    norm = math.sqrt(dot(update, update))
    if norm == 0:
        return update
    clipped, _ = clip(update, norm)
    return Noise(norm, noise_multiplier_for(epsilon, DELTA, 1)).add(clipped)


def _mean(updates: Sequence[Weights]) -> Weights:
    parts: dict[str, list[Tensor]] = {name: [update[name] for update in updates] for name in updates[0]}
    return {name: torch.stack(values).mean(0) for name, values in parts.items()}
