"""`tofu plan`: the bytes that a run will send, and the time that it will take."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tofu.cli.early import check_early
from tofu.cli.options import ConfigFile, Json, settings_from, with_settings
from tofu.settings import Value

if TYPE_CHECKING:
    from tofu.plan import Plan, PlannedPrivacy, PlannedSeconds


@with_settings
def plan(*, config: ConfigFile = None, json_: Json = False, overrides: dict[str, Value]) -> None:
    """Print what a run will cost in bytes and about how long it will take here, without running it."""
    settings = settings_from(config, overrides)
    check_early(settings, starts=False)
    from server.ledger import reply_overhead
    from server.secure_ranges import check_noise, check_secure_settings
    from tofu.data import FederatedData
    from tofu.models import initial_model
    from tofu.plan import estimate_seconds, make_plan, planned_privacy
    from tofu.reference_model import ReferenceModel
    from tofu.rounds.schedule import make_schedule

    data = FederatedData.of(settings.data, settings.run.seed)
    shape = data.shape
    network = ReferenceModel(initial_model(settings.model, shape, settings.run.seed).eval(), shape)
    schedule = make_schedule(settings.rounds, settings.training.rounds)
    if "secure" in schedule.kinds:
        check_secure_settings(settings)
        check_noise(network.param_spec, settings)
    kinds = [schedule.kind(r, ()) for r in range(1, settings.training.rounds + 1)]
    made = make_plan(
        settings,
        network,
        fedavg_rounds=kinds.count("fedavg"),
        secure_rounds=kinds.count("secure"),
        message_overhead=reply_overhead(),
    )
    privacy = planned_privacy(settings)
    seconds = estimate_seconds(
        settings, network, data.client(0), images=int(data.class_counts().sum()),
        compressed_rounds=made.compressed_rounds,
    )  # fmt: skip
    if json_:
        ratios = {name: getattr(made, name) for name in ("payload_ratio", "uplink_ratio", "both_ratio")}
        times = {"training_seconds": seconds.training, "encoding_seconds": seconds.encoding,
                 "least_encoding_seconds": seconds.least_encoding, "noise_seconds": seconds.noise}  # fmt: skip
        spent = {} if privacy is None else _spent(privacy)
        print(json.dumps(dataclasses.asdict(made) | ratios | times | spent))
        return
    for name, value in _rows(made, settings.model.model, seconds):
        print(f"{name:<26}{value}")
    if privacy is not None:
        after = f"after round {privacy.private_rounds} at delta {privacy.delta:g}"
        print(f"{'epsilon':<26}{_epsilon(privacy.epsilon)} {after}")
        if privacy.model_epsilon != privacy.epsilon:
            print(f"{'epsilon, who sees models':<26}{_epsilon(privacy.model_epsilon)} {after}")
        if privacy.private_rounds < settings.training.rounds:
            print(f"warning: {privacy.stop}", file=sys.stderr)
    for warning in made.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _spent(privacy: "PlannedPrivacy") -> dict[str, object]:
    """Return what the run spends as JSON values; an infinite epsilon is null."""
    both = {"epsilon": privacy.epsilon, "model_epsilon": privacy.model_epsilon}
    finite = {name: value if math.isfinite(value) else None for name, value in both.items()}
    return {**finite, "private_rounds": privacy.private_rounds}


def _epsilon(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "infinite"


def _rows(made: "Plan", model: str, seconds: "PlannedSeconds") -> Iterator[tuple[str, str]]:
    from tofu.formatting import compared, format_bytes, format_factor, format_seconds

    proxies = f" ({made.proxies} proxies of {made.proxy_side}x{made.proxy_side})" if made.proxies else ""
    yield "model", f"{model}, {made.parameters:,} parameters"
    yield "one update as float32", format_bytes(made.update_bytes)
    if made.compressed_rounds:
        yield "one compressed payload", f"{format_bytes(made.payload_bytes)}, {made.payload_ratio:.1f}x less{proxies}"
    if made.secure_rounds:
        less, _ = compared(made.update_bytes / made.secure_bytes)
        yield "one client, secure round", f"{format_bytes(made.secure_bytes)} in all stages, {less}"
    yield "message around a payload", format_bytes(made.message_overhead)
    rounds = f"{made.compressed_rounds} compressed, {made.fedavg_rounds} FedAvg, {made.secure_rounds} secure"
    yield "rounds", rounds
    yield "uplink of the run", format_bytes(made.uplink_bytes)
    equal = compared(made.uplink_ratio)[1] == "as"
    much = "as much" if equal else f"{format_factor(made.uplink_ratio)} as much"
    yield "uplink of FedAvg", f"{format_bytes(made.fedavg_uplink_bytes)}, {much}"
    if made.step_bytes:
        step_ratio = made.update_bytes / made.step_bytes
        yield "one step of the server", f"{format_bytes(made.step_bytes)}, {step_ratio:.1f}x less"
        yield "downlink of the run", format_bytes(made.downlink_bytes)
        yield "both directions", f"{' '.join(compared(made.both_ratio))} FedAvg"
    else:
        yield "downlink of either", format_bytes(made.downlink_bytes)
    encoding, total = format_seconds(seconds.encoding), format_seconds(seconds.total)
    if seconds.least_encoding < seconds.encoding:  # a client does not search where the correction is enough
        encoding = f"{format_seconds(seconds.least_encoding)} to {encoding}"
        total = f"{format_seconds(seconds.least)} to {total}"
    parts = [f"training {format_seconds(seconds.training)}"]
    parts += [f"encoding {encoding}"] if made.compressed_rounds else []
    parts += [f"noise {format_seconds(seconds.noise)}"] if seconds.noise else []
    parts += ["keys and masks of secure rounds not counted"] if made.secure_rounds else []
    yield "time here, estimated", f"{total} ({', '.join(parts)})"
    if seconds.least_encoding < seconds.encoding:
        yield "", "the shorter if corrections alone explain enough, the longer if every client searches for proxies"
