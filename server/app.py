"""The Flower ServerApp: reads the settings, runs the rounds, writes the run folder."""

import errno
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from server.checkpoint import Snapshot, read_checkpoint, remove_checkpoints, write_checkpoint
from server.ledger import Ledger
from server.runner import RoundResult, RoundRunner
from server.secure_ranges import check_secure_settings
from server.transport import GridTransport
from tofu.data import FederatedData, LabeledImages
from tofu.errors import RunError, TofuError
from tofu.flower.in_process import InProcessGrid, run_in_process
from tofu.formatting import printable
from tofu.log import start_logging
from tofu.models import build_model
from tofu.observers.json_lines import LoggedProgress
from tofu.observers.prometheus import RunMetrics
from tofu.observers.terminal import Progress, SilentProgress, make_progress
from tofu.recording import Recorder
from tofu.reference_model import ReferenceModel
from tofu.reporting.folder import RunFolder
from tofu.reporting.report import write_report
from tofu.settings import Settings
from tofu.tasks import backward_transfer, mean_accuracy
from tofu.weights import weights_sha256

app = ServerApp()

MAX_CLIENT_BYTES = 2**30
"""Of the clients' state in a checkpoint of a run in one process; with more, resumed clients begin without theirs."""

_CLIENT = "client "
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What writing to a disk that is full or broken ends with."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry point of `flwr run`; an error that a user can act on ends the run as failed, with one line on stderr."""
    try:
        settings = Settings.of(context.run_config)
        serve(grid, settings, make_progress(sys.stderr, quiet=settings.log == "json"))
    except TofuError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise  # Flower takes any other end, SystemExit too, for success


def serve(grid: Grid, settings: Settings, progress: Progress) -> dict[str, object]:
    """Run the whole federation and return its summary, as written to summary.json.

    Raises:
        TofuError: a setting or the data cannot be used, or a round got no valid reply. What the finished rounds
            wrote to the run folder stays.
    """
    start_logging(settings.log)
    progress = LoggedProgress(progress, grid.run.run_id)
    try:
        return _serve(grid, settings, progress)
    except BaseException as error:
        progress.broke_off(error)
        raise
    finally:
        progress.close()


def _serve(grid: Grid, settings: Settings, progress: Progress) -> dict[str, object]:
    began = time.perf_counter()
    torch.set_num_threads(settings.threads)
    data = open_run_data(settings)
    model = build_model(settings.model, data.shape, norm=settings.norm, seed=settings.seed)
    network = ReferenceModel(model.eval(), data.shape)
    test = data.test()
    if settings.has_secure_rounds:
        check_secure_settings(settings)
    ledger = Ledger()
    # Settings that cannot be used, such as a ratio out of reach, end the run here, before anything is written.
    federation = RoundRunner(GridTransport(grid), network, test, settings, ledger, progress)
    recorder = Recorder(Path(), settings.recorded, settings=settings, shape=data.shape)
    metrics = RunMetrics(grid.run.run_id, settings)
    with metrics.served(settings.metrics_port), closing(RunFolder(settings)) as folder:
        if settings.recorded:
            federation.recorder = recorder.in_folder(folder.path)
            progress.note(f"keeps what client {', '.join(settings.recorded)} sends in {folder.path}/record: as "
                          "sensitive as its data")  # fmt: skip
        progress.start(settings.rounds, settings.clients, f"{settings.model} on {settings.dataset}")
        try:
            return _run(folder, federation, Samples(data, test), grid, ledger, metrics, progress, began)
        except BaseException as error:
            metrics.end(failed=True)
            if metrics.begun:
                with suppress(OSError):
                    folder.write_metrics(metrics.text())
            if isinstance(error, OSError) and error.errno in _DISK:
                reason = f"the run's folder {folder.path} cannot be written ({error.strerror})"
                raise RunError(f"round {federation.round}: {reason}") from error
            raise


def _run(
    folder: RunFolder,
    federation: RoundRunner,
    samples: "Samples",
    grid: Grid,
    ledger: Ledger,
    metrics: RunMetrics,
    progress: Progress,
    began: float,
) -> dict[str, object]:
    """The rounds, from the first or from where a resumed run was; `began`: when, by `time.perf_counter`."""
    settings = federation.settings
    done = _resume(folder, federation, samples, grid, progress) if settings.resume else None
    if done is None:
        start = federation.evaluate()
        row: dict[str, object] = {
            "round": 0, "kind": "start", "accuracy": start.accuracy, "loss": finite(start.loss), "clients": 0,
            "failures": [], "explained_variance": None, "cosine": None, "train_loss": None, "uplink_bytes": 0,
            "downlink_bytes": 0, "fedavg_uplink_bytes": 0, "seconds": time.perf_counter() - began,
        }  # fmt: skip
        folder.add_round(row, ())
    metrics.begin(folder.path.resolve().name, folder.rows())
    folder.write_metrics(metrics.text())
    stopped = ""
    for round_ in range((done or 0) + 1, settings.rounds + 1):
        if stopped := _spent(federation, round_):
            progress.note(stopped)
            break
        try:
            row = _round(federation, ledger, samples, round_, progress)
        except BaseException:
            folder.add_messages(ledger.take())
            raise
        messages = ledger.take()
        if settings.checkpoint:
            _checkpoint(folder, federation, grid, row, messages)
        folder.add_round(row, messages)
        federation.write_model(folder)
        folder.write_samples(samples.arrays)
        metrics.add([row])
        folder.write_metrics(metrics.text())
        progress.round_done(row)
    summary: dict[str, object] = {
        "final_accuracy": federation.accuracies[-1],
        "rounds": federation.round,
        "uplink_bytes": ledger.uplink,
        "downlink_bytes": ledger.downlink,
        "fedavg_uplink_bytes": ledger.fedavg_uplink,
        "fedavg_downlink_bytes": ledger.fedavg_downlink,
        "uplink_ratio": ledger.ratio(),
        "both_ratio": ledger.both_ratio(),
        "payload_ratio": ledger.payload_ratio(),
        "weights_sha256": weights_sha256(federation.weights),
        **_transfer(federation),
        **({"epsilon": federation.account.epsilon, "delta": settings.privacy_delta} if federation.account else {}),
        **({"stopped": stopped} if stopped else {}),
        "run": str(folder.path),
        "seconds": time.perf_counter() - began,
    }
    folder.write_summary(summary)
    remove_checkpoints(folder.path)
    metrics.end(failed=False)
    folder.write_metrics(metrics.text())
    write_report(folder.path)
    progress.finish(summary)
    return summary


def _checkpoint(
    folder: RunFolder,
    federation: RoundRunner,
    grid: Grid,
    row: Mapping[str, object],
    messages: Sequence[Mapping[str, object]],
) -> None:
    """Keep the state after a round, before anything says that the round is done."""
    snapshot = Snapshot({"row": row, "messages": messages})
    federation.save(snapshot)
    if isinstance(grid, InProcessGrid):
        contexts = grid.contexts()
        if sum(map(len, contexts.values())) <= MAX_CLIENT_BYTES:
            snapshot.blobs |= {f"{_CLIENT}{name}": context for name, context in contexts.items()}
    write_checkpoint(folder.path, federation.round, snapshot)


def _resume(
    folder: RunFolder, federation: RoundRunner, samples: "Samples", grid: Grid, progress: Progress
) -> int | None:
    """Bring a run back to its last checkpoint; the round of that, or None where it had not come to one."""
    snapshot = read_checkpoint(folder.path, progress.note)
    if snapshot is None:
        folder.go_back(None, ())
        return None
    contexts = {name.removeprefix(_CLIENT): b for name, b in snapshot.blobs.items() if name.startswith(_CLIENT)}
    kept = isinstance(grid, InProcessGrid) and bool(contexts)
    if isinstance(grid, InProcessGrid) and kept:
        grid.restore_contexts(contexts)
    federation.restore(snapshot, clients_kept=kept)
    row = snapshot.plain["row"]
    folder.go_back(row, snapshot.plain["messages"])
    federation.write_model(folder)
    samples.restore(folder.read_samples(), int(row["round"]))
    progress.note(f"goes on after round {row['round']}" + ("" if kept else "; clients begin without error feedback"))
    return int(row["round"])


def serve_in_process(client_app: ClientApp, settings: Settings, progress: Progress | None = None) -> dict[str, object]:
    """Run this server app and a client app in this process, without ray and without opening a port.

    Returns:
        The run's summary, as `serve` does.

    Raises:
        TofuError: as `serve` does.
    """
    summaries: list[dict[str, object]] = []
    server_app = ServerApp()

    @server_app.main()
    def run(grid: Grid, context: Context) -> None:
        summaries.append(serve(grid, Settings.of(context.run_config), progress or SilentProgress()))

    run_in_process(
        server_app,
        client_app,
        run_config=settings.to_config(),
        num_supernodes=settings.clients,
        workers=settings.workers,
    )
    return summaries[0]


def open_run_data(settings: Settings) -> FederatedData:
    """The run's dataset, dealt as the settings say."""
    return settings.open_data()


def _round(
    federation: RoundRunner, ledger: Ledger, samples: "Samples", round_: int, progress: Progress
) -> dict[str, object]:
    began, settings = time.perf_counter(), federation.settings
    before = (ledger.uplink, ledger.downlink, ledger.fedavg_uplink)
    result = federation.run_round(round_)
    progress.phase(round_, result.kind, "evaluate", 0, 1)
    score = federation.evaluate()
    samples.add(result)
    compressed, secure = result.kind == "proxy", result.secure
    row: dict[str, object] = {
        "round": round_,
        "kind": result.kind,
        "accuracy": score.accuracy,
        "loss": finite(score.loss),
        "clients": len(result.survivors) if result.kind == "secure" else len(result.replies),
        "failures": [
            {"client": name, "node": str(result.nodes[name]), "reason": reason}
            for name, reason in result.failures.items()
        ],
        "explained_variance": result.mean("explained_variance") if compressed else None,
        "cosine": result.mean("cosine") if compressed else None,
        "step_explained_variance": result.step_explained_variance,
        "train_loss": secure.loss if secure else result.mean("train_loss"),
        "train_seconds": result.mean("train_seconds"),
        "encode_seconds": result.mean("encode_seconds"),
        "uplink_bytes": ledger.uplink - before[0],
        "downlink_bytes": ledger.downlink - before[1],
        "fedavg_uplink_bytes": ledger.fedavg_uplink - before[2],
        "seconds": time.perf_counter() - began,
    }
    if federation.account is not None:
        row |= {"epsilon": finite(federation.account.epsilon), "train_loss": None}
    if compressed:
        row["by_client"] = [
            {"client": client.name, "node": str(client.node), "explained_variance": reply.explained_variance}
            for client, reply in result.replies
        ]
    if metrics := result.plugin_metrics():
        row["plugins"] = metrics
    if settings.task_count > 1:
        row["task"], row["task_accuracies"] = (
            settings.round_context(samples.shape, round_).task,
            federation.task_accuracies[-1],
        )
    if result.kind == "secure":
        row |= {
            "clipped": secure.clipped if secure else None,
            "furthest": secure.furthest if secure else None,
            "abandoned": result.abandoned,
        }
    return row


def _spent(federation: RoundRunner, round_: int) -> str:
    """Why the run must stop before a round, or ""."""
    settings, account = federation.settings, federation.account
    if account is None or not settings.max_epsilon or account.allows(settings.noise_multiplier, settings.max_epsilon):
        return ""
    return (
        f"the privacy budget allows no round {round_}: epsilon is {account.epsilon:.4g}, "
        f"max-epsilon {settings.max_epsilon:g}"
    )


def _transfer(federation: RoundRunner) -> dict[str, float]:
    """ACC and BWT in percent (`tofu.tasks`), averaged over the orders in which the clients learnt the tasks."""
    settings, stream = federation.settings, federation.stream
    if stream.tasks < 2 or federation.round < settings.rounds:
        return {}
    each = settings.rounds // stream.tasks
    after = torch.tensor(federation.task_accuracies[each::each])  # [tasks, tasks]: after each task, on each task
    orders = [[stream.number(at, str(client)) for at in range(stream.tasks)] for client in range(settings.clients)]
    matrices = [after[:, order] for order in orders]
    return {
        "mean_accuracy": sum(map(mean_accuracy, matrices)) / len(matrices),
        "backward_transfer": sum(map(backward_transfer, matrices)) / len(matrices),
    }


def finite(value: float) -> float | None:
    """The value, or None where JSON could not hold it."""
    return value if math.isfinite(value) else None


class Samples:
    """Pictures for the report: some real images, and the proxies that one client sent in the first and last rounds."""

    def __init__(self, data: FederatedData, test: LabeledImages) -> None:
        self.arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {
            "real": test.images[:16].numpy(),
            "real_caption": np.array("held-out images of the same kind"),
        }
        self._data, self.shape = data, data.shape
        self._rounds: list[str] = []

    def restore(self, arrays: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]], round_: int) -> None:
        """Take back what was kept up to a round."""
        rounds = {int(name.removeprefix("proxies_")): name for name in arrays if name.startswith("proxies_")}
        self._rounds = [name for number, name in sorted(rounds.items()) if number <= round_]
        if self._rounds:
            kept = ("real", "real_caption", *self._rounds)
            self.arrays |= {name: value for name, value in arrays.items() if name in kept}

    def add(self, result: RoundResult) -> None:
        """Keep this round's proxies, beside those of the first round that had any."""
        if result.proxies is None:
            return
        if not self._rounds and result.shown.isdecimal() and int(result.shown) < self._data.clients:
            self.arrays["real"] = self._data.client(int(result.shown)).images[:16].numpy()
            self.arrays["real_caption"] = np.array(
                f"images of client {result.shown} (known here because one dataset was dealt to all clients)"
            )
        for old in self._rounds[1:]:
            del self.arrays[old]
        key = f"proxies_{result.round}"
        self._rounds = [*self._rounds[:1], key]
        self.arrays[key] = result.proxies.numpy()
