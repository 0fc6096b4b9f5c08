"""Settings that have no effect because of other settings, which a run reports in one line each."""

from collections.abc import Collection, Iterator
from typing import Any

from tofu.settings import FIELDS, FULL_WEIGHTS, Settings, dashed, settings_of_section

_NOT_OF_PROXIES = ("codec_mode",)
"""Settings under "Proxies" that `Settings` refuses without the proxy codec."""


def _conditions(settings: Settings) -> tuple[tuple[Any, ...], ...]:
    """Whether settings have an effect, the condition in words, and their names with underscores."""
    from tofu.rounds.schedule import make_schedule

    data, training, privacy, server = settings.data, settings.training, settings.privacy, settings.server
    schedule, aggregator, optimizer = settings.rounds.schedule, server.aggregator, server.server_optimizer
    kinds = make_schedule(settings.rounds, training.rounds).kinds
    used = (settings.codec.compressor if "compressed" in kinds else "", settings.downlink.downlink)
    proxies = [name for name in settings_of_section("Proxies") if name not in _NOT_OF_PROXIES]
    link, user = settings.link, ":"
    return (
        (":" not in settings.model.model, "a built-in model", "norm"),
        (data.partition == "dirichlet", "partition=dirichlet", "alpha"),
        (data.partition == "shards", "partition=shards", "shards_per_client"),
        (data.subpopulations, "subpopulations", "test_subpopulations"),
        (data.text_column, "a text-column", "vocabulary", "tokens"),
        (data.kind == "table", "a table", "feature_scaling"),
        (settings.plugins.tasks != "none", "tasks", "task_order", "task_heads"),
        (training.lr_schedule == "cosine", "lr-schedule=cosine", "lr_final_factor"),
        (training.lr_schedule == "step", "lr-schedule=step", "lr_step_rounds", "lr_step_factor"),
        (schedule == "switch" or user in schedule, "schedule=switch", "switch_round"),
        (schedule == "plateau" or user in schedule, "schedule=plateau", "plateau_patience", "plateau_gain"),
        (schedule in ("switch", "plateau") or user in schedule, "schedule=switch or plateau", "recovery"),
        ("compressed" in kinds, "a schedule with compressed rounds", "compressor", "ratio"),
        (any(name in ("proxy", "sparse") or user in name for name in used), "compressor=proxy", *proxies),
        (settings.downlink.downlink != FULL_WEIGHTS, "a compressed downlink", "downlink_ratio"),
        ("secure" in kinds, "a schedule with secure rounds", "secure_ratio", "secagg_dropout_fraction",
         "secagg_collusion_fraction", "secure_timeout"),
        (privacy.noise_multiplier, "noise-multiplier above 0", "clip_norm", "privacy_delta"),
        (privacy.clip_quantile, "clip-quantile above 0", "clip_lr", "clip_budget"),
        (aggregator in ("trimmed-mean", "multi-krum") or user in aggregator, "aggregator=trimmed-mean or multi-krum",
         "malicious_fraction"),
        (optimizer == "momentum" or user in optimizer, "server-optimizer=momentum", "server_momentum"),
        (optimizer == "ef21", "server-optimizer=ef21", "ef21_momentum"),
        (link.uplink_mbps or link.downlink_mbps, "uplink-mbps or downlink-mbps", "link_spread"),
    )  # fmt: skip


def unused_notes(settings: Settings, given: Collection[str] = ()) -> Iterator[str]:
    """Yield a line for each setting that has no effect and that the user gave.

    Args:
        given: names of the settings that the user gave, with underscores; all that differ from their defaults count as
            given.
    """
    values = settings.to_config()
    for holds, condition, *names in _conditions(settings):
        for name in names:
            if not holds and (name in given or values[dashed(name)] != FIELDS[name].default):
                yield f"{dashed(name)}={values[dashed(name)]} has no effect: it needs {condition}"
