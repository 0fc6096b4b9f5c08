"""Compressors by name."""

from typing import TYPE_CHECKING, Protocol

from tofu.compression.base import Compressor
from tofu.compression.eden import Eden
from tofu.compression.float16 import Float16
from tofu.compression.full import Full
from tofu.compression.powersgd import PowerSgd
from tofu.compression.qsgd import Qsgd
from tofu.compression.signsgd import SignSgd
from tofu.compression.stc import Stc
from tofu.compression.topk import TopK
from tofu.errors import SettingError
from tofu.reference_model import ReferenceModel

if TYPE_CHECKING:
    from tofu.codec.proxies import ProxySettings


class _ByRatio(Protocol):
    """A codec that the ratio alone decides."""

    def __call__(self, network_like: ReferenceModel, *, ratio: float) -> Compressor: ...


_BY_RATIO: dict[str, _ByRatio] = {
    TopK.name: TopK,
    Stc.name: Stc,
    PowerSgd.name: PowerSgd,
    Eden.name: Eden,
    SignSgd.name: SignSgd,
    Qsgd.name: Qsgd,
    Float16.name: Float16,
}
_NAMES = (Full.name, "proxy", *(name for name in _BY_RATIO if name != "float16"), "3sfc", "float16")


def compressor_names() -> tuple[str, ...]:
    """The names that `make_compressor` accepts."""
    return _NAMES


def make_compressor(
    name: str,
    network_like: ReferenceModel,
    *,
    ratio: float,
    count: int = 0,
    settings: "ProxySettings | None" = None,
    correction: float = 0.0,
) -> Compressor:
    """The compressor called `name`, for networks like `network_like`.

    Args:
        ratio: bytes wanted, as float32 bytes of the update over bytes of the payload.
        count: number of proxies of the proxy codec, 0 to derive it from the ratio.
        settings: of the proxy codec.
        correction: share of its bytes that the proxy codec leaves to a sparse correction.

    Raises:
        SettingError: unknown name, or a ratio that this model does not allow.
    """
    if name == Full.name:
        return Full()
    from tofu.codec.compressor import Proxy
    from tofu.codec.proxies import ProxySettings
    from tofu.compression.threesfc import ThreeSfc

    if name == Proxy.name:
        settings = settings or ProxySettings()
        return Proxy(network_like, ratio=ratio, count=count, settings=settings, correction=correction)
    if name == ThreeSfc.name:
        return ThreeSfc(network_like, ratio=ratio)
    if name in _BY_RATIO:
        return _BY_RATIO[name](network_like, ratio=ratio)
    raise SettingError("compressor", name, f"one of {', '.join(_NAMES)}")
