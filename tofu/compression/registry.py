"""Compressors by name."""

from tofu.compression.base import Compressor
from tofu.compression.full import Full
from tofu.compression.proxy import Proxy
from tofu.errors import SettingError
from tofu.network import Network
from tofu.proxy import ProxySettings

_NAMES = (Full.name, Proxy.name)


def compressor_names() -> tuple[str, ...]:
    """The names that `make_compressor` accepts."""
    return _NAMES


def make_compressor(
    name: str, network_like: Network, *, ratio: float, count: int = 0, settings: ProxySettings | None = None
) -> Compressor:
    """The compressor called `name`, for networks like `network_like`.

    Args:
        ratio: bytes wanted, as float32 bytes of the update over bytes of the payload.
        count: number of proxies, 0 to derive it from the ratio.
        settings: of the proxy codec.

    Raises:
        SettingError: unknown name, or a ratio that this model does not allow.
    """
    if name == Full.name:
        return Full()
    if name == Proxy.name:
        return Proxy(network_like, ratio=ratio, count=count, settings=settings or ProxySettings())
    raise SettingError("compressor", name, f"one of {', '.join(_NAMES)}")
