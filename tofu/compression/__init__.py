"""Compressors: an update as bytes and back. One file each; `compressors` finds them by name.

A new compressor is one file in this folder whose class subclasses `base.Compressor` and is decorated with
`@compressors.register("name")`, or a class anywhere that a user selects as `package.module:Class`.
This module does not import torch.
"""

from typing import TYPE_CHECKING

from tofu.codec.options import DEFAULTS, CompressorOptions
from tofu.registry import Registry
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
    """The compressor with a registered name, or of a class given as `package.module:Class`.

    Args:
        reference: a model like those of the run; it fixes the sizes.
        ratio: float32 bytes of an update over bytes of its payload, header included.

    Raises:
        SettingError: the name is unknown, or the compressor does not reach that ratio for this model.
    """
    from tofu.compression.base import OverRelaxed

    compressor = compressors.get(present_value("compressor", name))(reference, ratio=ratio, options=options)
    return compressor if options.gain == 1 or compressor.has_own_gain else OverRelaxed(compressor, options.gain)
