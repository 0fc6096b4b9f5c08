"""How numbers are written for people: byte sizes, durations, shares and factors. One spelling for the whole house."""

_STEP = 1000
_PREFIXES = ("kB", "MB", "GB", "TB", "PB")


def format_bytes(count: int) -> str:
    """Write a number of bytes in decimal units: `964 B`, `12.3 kB`, `2.5 MB`.

    Raises `ValueError` for a negative count.
    """
    if count < 0:
        raise ValueError(f"a number of bytes is never negative: {count}")
    if count < _STEP:
        return f"{count} B"
    size = float(count)
    for prefix in _PREFIXES:
        size /= _STEP
        # 999,950 bytes would round to "1000.0 kB": what counts is the number as it will be written.
        if round(size, 1) < _STEP:
            return f"{size:.1f} {prefix}"
    return f"{size:.1f} {_PREFIXES[-1]}"


def human_seconds(seconds: float) -> str:
    """Write a duration: `0.4 s`, `38 s`, `2 min 05 s`, `1 h 04 min`. A negative one counts as zero."""
    seconds = max(seconds, 0.0)
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def human_share(share: float, decimals: int = 1) -> str:
    """Write a share of one as a percentage: 0.962 is `96.2%`."""
    return f"{100 * share:.{decimals}f}%"


def human_factor(factor: float) -> str:
    """Write a factor with three figures: `2.14x`, `21.4x`, `1,214x`. A factor is 0 or more."""
    for limit, decimals in ((10, 2), (100, 1)):
        if round(factor, decimals) < limit:
            return f"{factor:.{decimals}f}x"
    return f"{factor:,.0f}x"


def printable(text: str) -> str:
    """The text on one line with nothing that a terminal obeys: line ends become spaces, control characters `?`.

    Names and reasons come from other machines; an escape sequence in one must not reach a terminal.
    """
    return "".join(sign if sign.isprintable() else " " if sign.isspace() else "?" for sign in text)
