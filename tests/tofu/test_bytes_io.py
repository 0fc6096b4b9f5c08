import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu.bytes_io import ByteReader
from tofu.errors import PayloadError

U16 = struct.Struct("<H")


def test_fields_are_read_in_order() -> None:
    reader = ByteReader(b"\x01\x02ab\x03\x00xyzrest", "message")
    assert reader.unpack(struct.Struct("<BB")) == (1, 2)
    assert reader.take(2) == b"ab"
    assert reader.prefixed(U16) == b"xyz"
    assert reader.left == 4
    assert reader.rest() == b"rest"
    reader.finish()


@pytest.mark.parametrize("data", [None, 3, "text", bytearray(b"ab")])
def test_only_bytes_are_read(data: object) -> None:
    with pytest.raises(PayloadError, match=r"message is .*expected bytes"):
        ByteReader(data, "message")


def test_errors_name_the_message_the_field_and_the_sizes() -> None:
    with pytest.raises(PayloadError, match="message has 3 bytes, expected at least 4"):
        ByteReader(b"abc", "message", min_bytes=4)
    with pytest.raises(PayloadError, match="message has 3 bytes, expected 0 to 2"):
        ByteReader(b"abc", "message", max_bytes=2)
    with pytest.raises(PayloadError, match=r"message.*3 bytes are left, expected 4 of the key"):
        ByteReader(b"abc", "message").take(4, "of the key")
    with pytest.raises(PayloadError, match="message is followed by 3 unexpected bytes"):
        ByteReader(b"abc", "message").finish()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=20))
def test_any_bytes_are_read_or_raise_a_payload_error(data: bytes) -> None:
    reader = ByteReader(data, "message")
    with suppress(PayloadError):
        parts = [reader.prefixed(U16), reader.prefixed(U16)]
        assert sum(map(len, parts)) + 4 + reader.left == len(data)
