"""Seeded mutations of a message, as a client, a server or a bad line could send it."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MUTATIONS = 10_000
"""Of each kind of message."""

_EXTREMES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f")


def mutations(originals: Sequence[bytes], count: int = MUTATIONS, seed: int = 0) -> Iterator[bytes]:
    """`count` mutated copies of the originals in turn: one to four bits flipped, bytes overwritten, cut, added, moved.

    >>> list(mutations([b"message"], 2)) == list(mutations([b"message"], 2))
    True
    """
    drawn = random.Random(seed)
    for number in range(count):
        data = bytearray(originals[number % len(originals)])
        for _ in range(drawn.choice((1, 1, 2, 4))):
            # Headers are short and decide most, so half of the mutations are there.
            end = min(len(data), 48) if drawn.random() < 0.5 else len(data)
            place, kind = drawn.randrange(max(1, end)), drawn.randrange(6)
            if kind == 0 and data:
                data[place % len(data)] ^= 1 << drawn.randrange(8)
            elif kind == 1 and data:
                data[place % len(data)] = drawn.randrange(256)
            elif kind == 2:
                extreme = drawn.choice(_EXTREMES)
                data[place : place + len(extreme)] = extreme
            elif kind == 3:
                del data[place : place + drawn.randrange(1, 9)]
            elif kind == 4:
                data[place:place] = drawn.randbytes(drawn.randrange(1, 9))
            else:
                other = drawn.randrange(max(1, len(data)))
                data[place:place] = data[other : other + drawn.randrange(1, 64)]
        yield bytes(data)


_VALUES: tuple[Any, ...] = (
    0, 1, -1, 2**31, 2**62, 2**63 - 1, -(2**63), True, False, 0.5, math.nan, math.inf, -math.inf, 1e308, "", "\n", "0",
    "x" * 1000, "[" * 20_000, "[[1]]", b"", b"\xff" * 50, [], [0], [math.nan, 1e308], ["x"], [""], [b""], [b"x", b"y"],
)  # fmt: skip
"""One of each kind of value that a record of Flower can hold, and its extremes."""


def mutated_records(
    originals: Sequence[Mapping[str, Any]], count: int = MUTATIONS, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield `count` mutated copies of records in turn: values of another kind, mutated, renamed, exchanged, left out.

    >>> list(mutated_records([{"a": 1}], 9)) != [{"a": 1}] * 9
    True
    """
    drawn = random.Random(seed)
    for number in range(count):
        record = dict(originals[number % len(originals)])
        for _ in range(drawn.choice((1, 1, 2, 3))):
            name, other = drawn.choice(list(record) or ["x"]), drawn.choice(list(record) or ["x"])
            value, kind = record.pop(name, 0), drawn.randrange(6)
            if kind == 0:
                record[f"{name}{drawn.choice(('', ' ', 's'))}"] = value
            elif kind == 1 and other in record:
                record[name], record[other] = record[other], value
            elif kind == 2 and isinstance(value, bytes | str):
                data = value if isinstance(value, bytes) else value.encode()
                changed = next(mutations([data], 1, drawn.randrange(2**32)))
                record[name] = changed if isinstance(value, bytes) else changed.decode(errors="replace")
            elif kind < 5:
                record[name] = drawn.choice(_VALUES)
        yield record
