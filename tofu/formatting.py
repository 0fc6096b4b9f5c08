"""Text for users: byte sizes, durations, fractions, factors, numbers of things, and printable names."""

_STEP = 1000
_PREFIXES = ("kB", "MB", "GB", "TB", "PB")


def format_bytes(count: int) -> str:
    """Format a number of bytes in decimal units: `964 B`, `12.3 kB`, `2.5 MB`.

    Raises:
        ValueError: the count is negative.
    """
    if count < 0:
        raise ValueError(f"a number of bytes must not be negative, got {count}")
    if count < _STEP:
        return f"{count} B"
    size = float(count)
    for prefix in _PREFIXES:
        size /= _STEP
        # 999,950 bytes must not become "1000.0 kB", so the rounded number decides.
        if round(size, 1) < _STEP:
            return f"{size:.1f} {prefix}"
    return f"{size:.1f} {_PREFIXES[-1]}"


def format_seconds(seconds: float) -> str:
    """Format a duration: `0.4 s`, `38 s`, `2 min 05 s`, `1 h 04 min`. A negative duration counts as zero."""
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


def format_fraction(fraction: float, decimals: int = 1) -> str:
    """Format a fraction of 1 as a percentage: 0.962 is `96.2%`."""
    return f"{100 * fraction:.{decimals}f}%"


def format_factor(factor: float) -> str:
    """Format a factor (0 or more) with at least three significant digits: `2.14x`, `21.4x`, `1,214x`."""
    for limit, decimals in ((10, 2), (100, 1)):
        if round(factor, decimals) < limit:
            return f"{factor:.{decimals}f}x"
    return f"{factor:,.0f}x"


def compared(factor: float) -> tuple[str, str]:
    """Compare something with `factor` (above 0) times as much, in words; amounts that would be shown as equal are.

    >>> compared(21.4), compared(0.5), compared(0.999)
    (('21.4x less', 'than'), ('2.00x more', 'than'), ('as much', 'as'))
    """
    shown = format_factor(max(factor, 1 / factor))
    if shown == format_factor(1):
        return "as much", "as"
    return f"{shown} {'less' if factor > 1 else 'more'}", "than"


def format_count(count: int, noun: str) -> str:
    """Format a number of things: `1 round`, `2 rounds`, `1,000 rounds`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def bounded_line(text: str) -> str:
    """Return a text in one line of at most 300 characters; the middle of a longer one is left out."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:200]} ... {line[-95:]}"


def printable(text: str) -> str:
    """Replace white space by spaces and other unprintable characters by `?`.

    Names and error texts come from other machines, and an escape sequence in one of them must not reach a terminal.
    """
    return "".join(sign if sign.isprintable() else " " if sign.isspace() else "?" for sign in text)


def shortened(items: object, at_most: int = 20) -> str:
    """Return the items of a list, separated by commas, and the number of those beyond the first `at_most`.

    >>> shortened([1, 2, 3], at_most=2)
    '1, 2 and 1 more'
    """
    texts = [str(item) for item in items] if isinstance(items, list) else [str(items)]
    more = f" and {len(texts) - at_most} more" if len(texts) > at_most else ""
    return ", ".join(texts[:at_most]) + more


def proxies_line(with_proxies: int, updates: int) -> str:
    """Return a line about how many of the updates of compressed rounds came as proxies.

    >>> proxies_line(3, 4)
    '3 of 4 updates came as proxies, the others as a sparse correction alone'
    """
    if not with_proxies:
        return f"none of {updates} updates came as proxies: the sparse correction alone explained enough"
    rest = ", the others as a sparse correction alone" if with_proxies < updates else ""
    return f"{with_proxies} of {updates} updates came as proxies{rest}"
