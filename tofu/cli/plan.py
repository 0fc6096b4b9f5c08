"""`tofu plan`: the bytes that a run will send, and the time that it will take."""

import dataclasses
import json
import sys

from tofu.cli.options import ConfigFile, Json, settings_from, with_settings
from tofu.settings import Value


@with_settings
def plan(*, config: ConfigFile = None, json_: Json = False, overrides: dict[str, Value]) -> None:
    """Print what a run will cost in bytes and about how long it will take here, without running it."""
    from server.ledger import reply_overhead
    from tofu.data import FederatedData
    from tofu.formatting import format_bytes, format_seconds
    from tofu.models import initial_model
    from tofu.plan import estimate_seconds, make_plan
    from tofu.reference_model import ReferenceModel
    from tofu.rounds.schedule import make_schedule

    settings = settings_from(config, overrides)
    data = FederatedData.of(settings.data, settings.run.seed)
    shape = data.shape
    network = ReferenceModel(initial_model(settings.model, shape, settings.run.seed).eval(), shape)
    schedule = make_schedule(settings.rounds, settings.training.rounds)
    kinds = [schedule.kind(r, ()) for r in range(1, settings.training.rounds + 1)]
    made = make_plan(
        settings,
        network,
        fedavg_rounds=kinds.count("fedavg"),
        secure_rounds=kinds.count("secure"),
        message_overhead=reply_overhead(),
    )
    seconds = estimate_seconds(
        settings, network, data.client(0), images=int(data.class_counts().sum()),
        compressed_rounds=made.compressed_rounds,
    )  # fmt: skip
    if json_:
        extra: dict[str, object] = {
            name: getattr(made, name) for name in ("payload_ratio", "uplink_ratio", "both_ratio")
        }
        extra |= {"training_seconds": seconds.training, "encoding_seconds": seconds.encoding}
        print(json.dumps(dataclasses.asdict(made) | extra))
        return
    proxies = f" ({made.proxies} proxies of {made.proxy_side}x{made.proxy_side})" if made.proxies else ""
    rows = [
        ("model", f"{settings.model.model}, {made.parameters:,} parameters"),
        ("one update as float32", format_bytes(made.update_bytes)),
        ("one compressed payload", f"{format_bytes(made.payload_bytes)}, {made.payload_ratio:.1f}x less{proxies}"),
        ("message around a payload", format_bytes(made.message_overhead)),
        ("rounds", f"{made.compressed_rounds} compressed, {made.fedavg_rounds} FedAvg, {made.secure_rounds} secure"),
        ("uplink of the run", format_bytes(made.uplink_bytes)),
        ("uplink of FedAvg", f"{format_bytes(made.fedavg_uplink_bytes)}, {made.uplink_ratio:.1f}x as much"),
    ]
    if made.step_bytes:
        rows += [
            (
                "one step of the server",
                f"{format_bytes(made.step_bytes)}, {made.update_bytes / made.step_bytes:.1f}x less",
            ),
            ("downlink of the run", format_bytes(made.downlink_bytes)),
            ("both directions", f"{made.both_ratio:.1f}x less than FedAvg"),
        ]
    else:
        rows.append(("downlink of either", format_bytes(made.downlink_bytes)))
    parts = f"training {format_seconds(seconds.training)}, encoding {format_seconds(seconds.encoding)}"
    rows.append(("time here, estimated", f"{format_seconds(seconds.total)} ({parts})"))
    for name, value in rows:
        print(f"{name:<26}{value}")
    for warning in made.warnings:
        print(f"warning: {warning}", file=sys.stderr)
