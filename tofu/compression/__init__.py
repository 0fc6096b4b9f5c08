"""Compressors, which encode updates as bytes and decode them. One file each; `compressors` finds them by name.

A new compressor is one file in this folder whose class subclasses `base.Compressor` and is decorated with
`@compressors.register("name")`, or a class anywhere that a user selects as `package.module:Class`.
This module does not import torch.
"""

from typing import TYPE_CHECKING

from tofu.codec.options import DEFAULTS, CompressorOptions
from tofu.errors import user_code
from tofu.registry import Registry
from tofu.settings import FULL_WEIGHTS, Settings
from tofu.settings.deprecated import present_value

if TYPE_CHECKING:
    from tofu.compression.base import Compressor
    from tofu.reference_model import ReferenceModel

compressors: "Registry[type[Compressor]]" = Registry(
    "compressor", "tofu.compression.base:Compressor", "tofu.compression", "tofu.codec"
)


def make_compressor(
    name: str, reference: "ReferenceModel", *, ratio: float, options: CompressorOptions = DEFAULTS
) -> "Compressor":
    """Return the compressor with a registered name, or of a class given as `package.module:Class`.

    Args:
        reference: the run's model, or one with equal shapes.
        ratio: float32 bytes of an update over bytes of its payload, header included.

    Raises:
        SettingError: the name is unknown, or the compressor does not reach that ratio for this model.
    """
    from tofu.compression.base import Checked, OverRelaxed

    kind = compressors.get(present_value("compressor", name))
    if kind.__module__.startswith("tofu."):
        compressor = kind(reference, ratio=ratio, options=options)
    else:
        with user_code("compressor", name, "a class whose __init__(reference, *, ratio, options) makes a compressor"):
            compressor = kind(reference, ratio=ratio, options=options)
    if not type(compressor).__module__.startswith("tofu."):
        compressor = Checked(compressor, name)
    return compressor if options.gain == 1 or compressor.has_own_gain else OverRelaxed(compressor, options.gain)


def uplink_compressor(settings: Settings, kind: str, reference: "ReferenceModel") -> "Compressor":
    """Return the compressor of the clients' updates in rounds of this kind ("compressed" or "fedavg";
    a secure round has none).

    Raises:
        SettingError: the compressor does not reach the ratio for this model.
    """
    codec, compressed = settings.codec, kind != "fedavg"
    gain, below = (codec.over_relaxation, codec.proxies_below) if settings.residual_fraction else (1.0, 1.0)
    options = CompressorOptions.of(
        codec, settings.run.device, proxies=codec.proxies, gain=gain if compressed else 1.0, proxies_below=below
    )
    name = _usable(codec.compressor, reference) if compressed else "none"
    return make_compressor(name, reference, ratio=codec.ratio, options=options)


def downlink_compressor(settings: Settings, reference: "ReferenceModel") -> "Compressor | None":
    """Return the compressor of the server's steps, or None if the server sends its weights.

    Raises:
        SettingError: the compressor does not reach the ratio for this model.
    """
    downlink = settings.downlink
    if downlink.downlink == FULL_WEIGHTS:
        return None
    options = CompressorOptions.of(settings.codec, settings.run.device)
    name = _usable(downlink.downlink, reference)
    return make_compressor(name, reference, ratio=downlink.downlink_ratio, options=options)


def payload_notes(settings: Settings, reference: "ReferenceModel") -> tuple[str, ...]:
    """Return what a user should know before the first compressed round about what it sends, one line each."""
    codec = settings.codec
    notes = []
    if codec.compressor != _usable(codec.compressor, reference):
        why = reference.call.impossible
        notes.append(f"updates are sent as the sparse correction alone (compressor=sparse): {why}")
    links = {"updates": uplink_compressor(settings, "compressed", reference),
             "steps of the server": downlink_compressor(settings, reference)}  # fmt: skip
    for name, compressor in links.items():
        content = compressor.describe() if compressor is not None else None
        notes += [f"{name}: {content.note}"] if content is not None and content.note else []
    return tuple(notes)


def _usable(name: str, reference: "ReferenceModel") -> str:
    """Return the name; "sparse" if the compressor differentiates the model but no `ModelCall` is known."""
    from tofu.reference_model import NEEDS_CALL

    return "sparse" if name in NEEDS_CALL and not reference.call.inputs else name
