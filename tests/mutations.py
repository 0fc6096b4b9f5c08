"""Seeded mutations of a message, as a client, a server or a bad line could send it."""

import random
from collections.abc import Iterator, Sequence

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
