"""What a client insists on, whatever a run asks for: rules of its node config."""

from flwr.app import Context

from tofu.errors import DataError
from tofu.settings.deprecated import present_node_config


def client_name(context: Context) -> str:
    """The client's name in ledger and logs: its partition id, or its node id if it has none."""
    return str(context.node_config.get("partition-id", context.node_id))


def check_policy(kind: str, noise_multiplier: float, context: Context) -> None:
    """Check a round against the node config's `allowed-rounds` and `min-noise-multiplier`.

    Raises:
        DataError: the client does not take part in such a round.
    """
    config = present_node_config(context.node_config)
    allowed = config.get("allowed-rounds")
    if allowed is not None and kind not in [name.strip() for name in str(allowed).split(",")]:
        raise DataError(f"this client takes part in rounds of kind {allowed}, not {kind}")
    minimum = config.get("min-noise-multiplier", 0.0)
    if isinstance(minimum, str) or noise_multiplier < minimum:
        raise DataError(f"this client takes part with noise-multiplier {minimum} or more, not {noise_multiplier:g}")
