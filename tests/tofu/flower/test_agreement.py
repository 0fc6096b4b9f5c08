"""The texts that name different arguments; the server's text is hostile input."""

import json
from typing import Any

import numpy as np
import pytest
from torch import nn

from tofu.errors import SettingError
from tofu.flower.agreement import arguments_text, named_differences
from tofu.flower.hybrid import HybridMod, hybrid
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
    found = named_differences(own, '{"ratio": "21", "downlink": "10", "bits": "16"}', {"bits": 32})
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
        ({"step_ahead": 0.50000001}, "step_ahead"),
        ({"ratio": 50.00001}, "ratio"),
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


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"ratio": 100}, {"ratio": 100.0}),
        ({"downlink": 10}, {"downlink": 10.0}),
        ({"error_feedback": True, "step_ahead": 0}, {"error_feedback": 1.0, "step_ahead": 0.0}),
        ({"correction": 1, "proxies_below": 1, "over_relaxation": 1},
         {"correction": 1.0, "proxies_below": 1.0, "over_relaxation": 1.0}),
    ],
)  # fmt: skip
def test_equal_numbers_of_different_types_agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert UpdateCodec(net, SHAPE, **one).digest == UpdateCodec(net, SHAPE, **other).digest
    assert UpdateCodec(net, SHAPE, **one).text == UpdateCodec(net, SHAPE, **other).text


def test_equal_options_of_different_types_agree() -> None:
    own = SecureOptions(bits=np.int64(16), metrics=8.0, clip_norm=2, app="tofu, tests")  # type: ignore[arg-type]
    assert own.digest == SecureOptions(bits=16, metrics=8, clip_norm=2.0, app="tofu,tests").digest
    with pytest.raises(SettingError, match=r"bits=.* is not usable: expected a whole number"):
        SecureOptions(bits=16.5)  # type: ignore[arg-type]


def differences_of(own: HybridMod, servers: HybridMod) -> str:
    assert own._compress._codec.digest != servers._compress._codec.digest
    return named_differences(own._compress._codec.text, servers._compress._codec.text, UpdateCodec.defaults())


def test_options_of_the_secure_rounds_of_a_hybrid_are_named_one_by_one() -> None:
    many = {
        "metrics": 20, "noise_multiplier": 0.5, "clip_norm": 2.0, "clip_quantile": 0.3, "clip_lr": 0.3, "dropout": 0.3,
    }  # fmt: skip
    found = differences_of(hybrid(secure={**many, "collusion": 0.2}), hybrid(secure={**many, "collusion": 0.3}))
    assert found == "secure.collusion: 0.2 at this client, 0.3 at the server"
    found = differences_of(hybrid(secure={"bits": 16}), hybrid())
    assert found == "secure.bits: 16 at this client, 32 (the default) at the server"
    found = differences_of(hybrid(error_feedback=0.5), hybrid())
    assert "secure.error_feedback: 0.5 at this client, 1 at the server" in found


def test_what_is_not_given_at_one_end_is_named_so() -> None:
    own, other = UpdateCodec(net, SHAPE), UpdateCodec(net, SHAPE, forward=halved)
    found = named_differences(own.text, other.text, own.defaults())
    assert found.startswith("forward: not given at this client, halved (")


def test_values_whose_ends_differ_are_named() -> None:
    own, other = (json.dumps({"compressor": f"{'package.' * 20}module:{name}"}) for name in ("Mine", "Yours"))
    found = named_differences(own, other, {})
    assert "module:Mine at this client" in found
    assert "module:Yours at the server" in found


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
