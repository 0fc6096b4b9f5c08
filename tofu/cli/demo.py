"""`tofu demo`: FedAvg and proxies on the same federation, with a report."""

import sys
from pathlib import Path

from tofu.cli.early import check_early
from tofu.cli.options import ConfigFile, Quiet, settings_from, with_settings
from tofu.cli.run import run_settings
from tofu.reporting.run_settings import check_new
from tofu.settings import FULL_WEIGHTS, Value


@with_settings
def demo(*, config: ConfigFile = None, quiet: Quiet = False, overrides: dict[str, Value]) -> None:
    """Train the same federation twice, with FedAvg and with proxies, and compare accuracy and bytes.

    Without options: ten clients, a small network, the digits that come with scikit-learn.
    """
    tofu = settings_from(config, overrides)
    given = tofu.run.run_folder
    if given:
        check_new(Path(f"{given}-fedavg"))
    check_early(tofu)
    from tofu.formatting import compared, format_bytes, proxies_line
    from tofu.reporting.folder import add_baseline, fresh_folder
    from tofu.reporting.report import write_report
    from tofu.rounds.record import read_rounds

    # Compressed rounds without compression: so the server chooses its step in the same way in both runs.
    fedavg = tofu.replace(schedule="compressed", compressor="none", downlink=FULL_WEIGHTS)
    folder = given or str(fresh_folder(tofu))
    tofu = tofu.replace(run_folder=folder)
    fedavg = fedavg.replace(run_folder=f"{given}-fedavg" if given else str(fresh_folder(fedavg)))
    print(f"1 of 2: FedAvg, {fedavg.data.clients} clients, float32 updates", file=sys.stderr)
    baseline = run_settings(fedavg, quiet=quiet)
    print("2 of 2: TOFU, compressed updates", file=sys.stderr)
    summary = run_settings(tofu, quiet=quiet)
    add_baseline(Path(folder), Path(baseline["run"]))
    page = write_report(Path(folder))
    print(f"\n{'':<22}{'test accuracy':>14}{'uplink':>12}{'against FedAvg':>16}")
    for name, result in (("FedAvg", baseline), ("TOFU", summary)):
        accuracy, uplink, ratio = result["final_accuracy"], result["uplink_bytes"], result["uplink_ratio"]
        against = "" if result is baseline else compared(ratio)[0]
        print(f"{name:<22}{accuracy:>13.1%} {format_bytes(uplink):>11}{against:>16}")
    rounds = [one for one in read_rounds(Path(folder) / "metrics.jsonl") if one.with_proxies is not None]
    if rounds:
        sent, updates = sum(one.with_proxies or 0 for one in rounds), sum(one.clients for one in rounds)
        print(f"\n{proxies_line(sent, updates)}")
    if (payload_ratio := summary["payload_ratio"] or 0) > 1:
        text = f"a payload is {payload_ratio:.0f}x smaller than an update"
        print(f"{text}; the uplink also has Flower's part of each message, and introductions in round 1")
    print(f"\nreport: {page}")
