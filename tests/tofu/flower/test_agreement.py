"""The texts that name different arguments; the server's text is hostile input."""

import json
from typing import Any

import pytest
from torch import nn

from tofu.flower.agreement import arguments_text, joined_texts, named_differences
from tofu.flower.secure_options import SecureOptions
from tofu.flower.update_codec import UpdateCodec

SHAPE = (1, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def halved(model: nn.Module, inputs: Any) -> Any:
    return model(0.5 * inputs)


def test_arguments_that_are_not_defaults_are_named_with_both_values() -> None:
    own = arguments_text({"ratio": 20, "downlink": 10.0, "bits": 32}, {"ratio": 50.0, "downlink": 0.0, "bits": 32})
    assert own == '{"ratio": "20", "downlink": "10"}'
    found = named_differences(own, joined_texts('{"ratio": "21"}', '{"downlink": "10", "bits": "16"}'), {"bits": 32})
    assert found == (
        "bits: 32 (the default) at this client, 16 at the server; ratio: 20 at this client, 21 at the server"
    )


@pytest.mark.parametrize(
    "hostile", [None, b"{}", "", "[", "[" * 4000, "[1]", '{"ratio": 1}', "x" * 5000, "null", '{"ratio": "20"}']
)
def test_a_text_that_names_nothing_gives_the_other_reason(hostile: object) -> None:
    assert named_differences('{"ratio": "20"}', hostile, {}) == "none is named: use one version of tofu-fl"


def test_a_servers_text_cannot_break_the_line() -> None:
    found = named_differences("{}", json.dumps({"a\nb": "\x1b[31m", "n" * 900: "v" * 900}), {})
    assert found.isprintable()
    assert len(found) < 400


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"ratio": 30}, "ratio"),
        ({"compressor": "topk"}, "compressor"),
        ({"forward": halved}, "forward"),
        ({"target_shape": (10,), "loss": lambda outputs, targets: (outputs - targets).square().sum()}, "loss"),
        ({"correction": 0.5}, "correction"),
        ({"proxies_below": 0.5}, "proxies_below"),
        ({"over_relaxation": 1.5}, "over_relaxation"),
        ({"error_feedback": 0.0}, "error_feedback"),
        ({"error_feedback": 0.9}, "error_feedback"),
        ({"step_ahead": 0.1}, "step_ahead"),
        ({"downlink": 5}, "downlink"),
        ({"differences": True}, "differences"),
    ],
)
def test_every_argument_that_changes_the_digest_is_in_the_text(changed: dict[str, Any], named: str) -> None:
    own, other = UpdateCodec(net, SHAPE), UpdateCodec(net, SHAPE, **changed)
    assert own.digest != other.digest
    assert f"{named}: " in named_differences(own.text, other.text, own.defaults())


def test_an_input_shape_is_named() -> None:
    assert "input_shape: ((1, 8, 8),) at this client" in named_differences(
        UpdateCodec(net, SHAPE).text, UpdateCodec(net, (1, 4, 16)).text, UpdateCodec.defaults()
    )


def test_arguments_of_one_end_alone_are_not_named() -> None:
    own, other = UpdateCodec(net, SHAPE, seed=3), UpdateCodec(net, SHAPE)
    assert own.digest == other.digest
    assert own.text == other.text


def test_options_of_secure_rounds_are_named() -> None:
    own, other = SecureOptions(bits=16), SecureOptions(collusion=0.2)
    assert named_differences(own.text, other.text, own.defaults()) == (
        "bits: 16 at this client, 32 (the default) at the server; "
        "collusion: 0.1 (the default) at this client, 0.2 at the server"
    )
