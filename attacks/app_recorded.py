"""A recorded message of a Flower app (`tofu.record`), with the app's own model and the images of its clients."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from attacks.base import AttackError
from attacks.evaluate import CONTROL, recorded_scenario
from attacks.observation import Observation
from tofu.data import LabeledImages
from tofu.errors import SettingError, user_code
from tofu.flower.update_codec import ArrayModel, UpdateCodec
from tofu.imports import import_object
from tofu.recording import AppCodec, AppRecording
from tofu.wire import read_payload


@dataclass(frozen=True)
class AppMessage:
    """A recorded message, with the model and the images of the app that sent it.

    Attributes:
        model: `package.module:function` that builds the app's network, without arguments.
        dataset: `package.module:function` that returns the images [n, channels, height, width], uint8 or float in
            [0, 1], and labels int64 [n] of the client with the given name; for "test", images of no client.

    Raises:
        SettingError: model or dataset is missing or cannot be used.
    """

    recording: AppRecording
    model: str | None
    dataset: str | None

    @cached_property
    def observation(self) -> Observation:
        """The attacker's observation.

        Raises:
            AttackError: the model is not the one of the recorded arrays.
            PayloadError: the payload is not usable.
        """
        seen = self.recording
        codec_options = vars(seen.codec or AppCodec("none", 1.0, 0.0, 1.0))
        codec = UpdateCodec(self._network, seen.input_shape, **codec_options)
        try:
            reference = codec.reference(seen.base)
        except SettingError as error:
            raise AttackError(f"the recorded arrays are not those of model={self.model!r}: {error}") from error
        described = None
        if seen.codec is None:
            update = reference.update(seen.base, _arrays(seen.payload))
        else:
            compressor = codec.compressor(reference.reference)
            body = read_payload(
                seen.payload, codec=compressor.code, round_=seen.round, fingerprint=None, max_bytes=len(seen.payload)
            ).body  # fmt: skip
            update, described = compressor.decompress(reference.reference, body), compressor.describe(body)
        return Observation(
            message=self._kind, network=self._with_normalization(reference).reference, update=update,
            images=seen.examples, batch_size=seen.batch_size, epochs=seen.epochs, lr=seen.lr,
            proxies=described.proxies if described else None, proxy_settings=described.settings if described else None,
            payload_bytes=len(seen.payload), clients=seen.clients,
        )  # fmt: skip

    @property
    def truth(self) -> LabeledImages:
        """The images of the client, or of all clients of a sum (name "sum")."""
        return self._images(self.recording.client)

    @property
    def others(self) -> LabeledImages:
        """Images that the update was not computed from."""
        return self._images("test")

    def controls(self, _: Observation) -> tuple[Observation, ...]:
        """No controls, because an app's training cannot be repeated."""
        return ()

    @property
    def seed(self) -> int:
        return 0

    def next_step(self, run: Path) -> dict[str, object]:
        """Return no field: the app's own training made the message, and no command of ours repeats it."""
        return {}

    def scenario(self, observation: Observation) -> dict[str, object]:
        """Return the fields of a row of results that describe the scenario."""
        seen = self.recording
        return recorded_scenario(
            observation, dataset=self.dataset, model=self.model, norm="", seed=0, client=seen.client,
            round_=seen.round,
        )  # fmt: skip

    @property
    def _kind(self) -> str:
        seen = self.recording
        if seen.clients > 1:
            return f"recorded sum of {seen.clients}"
        return CONTROL if seen.codec is None else f"recorded {seen.codec.compressor}"

    @cached_property
    def _network(self) -> nn.Module:
        network = _imported("model", self.model, "package.module:function that builds the app's network")()
        if not isinstance(network, nn.Module):
            raise SettingError("model", self.model, "a function without arguments that returns a torch.nn.Module")
        return network

    def _with_normalization(self, reference: ArrayModel) -> ArrayModel:
        """Attacks use pixels in [-1, 1]; a hook converts them to the input of the app's model."""
        mean, std = self.recording.mean, self.recording.std
        if (mean, std) != (0.5, 0.5):
            reference.reference.model.register_forward_pre_hook(lambda _, args: (((args[0] + 1) / 2 - mean) / std,))
        return reference

    def _images(self, name: str) -> LabeledImages:
        load = _imported("dataset", self.dataset, "package.module:function that returns a client's images and labels")
        images, labels = load(name)
        shape = tuple(images.shape[1:])
        if shape != self.recording.input_shape or len(labels) != len(images) or not len(labels):
            raise SettingError(
                "dataset", self.dataset,
                f"images of {self.recording.input_shape} for {name!r} with as many labels, not {shape}",
            )  # fmt: skip
        labels = torch.as_tensor(labels).long()
        return LabeledImages(_to_uint8(images), labels, int(labels.max()) + 1)


def _imported(field: str, name: str | None, accepted: str) -> Callable[..., Any]:
    if name is None or ":" not in name:
        raise SettingError(field, name, accepted)
    with user_code(field, name, accepted):
        found = import_object(name)
    if not callable(found):
        raise SettingError(field, name, accepted)
    return found  # type: ignore[no-any-return]


def _arrays(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (ValueError, safetensors.SafetensorError) as error:
        raise AttackError(f"the recorded arrays cannot be read: {error}") from error


def _to_uint8(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else (images.clamp(0, 1) * 255).round().to(torch.uint8)
