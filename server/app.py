"""The Flower ServerApp: reads the settings, runs the rounds, writes the run folder."""

import dataclasses
import errno
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from server.checkpoint import Snapshot, keep_last_checkpoint, read_checkpoint, write_checkpoint
from server.client_registry import Client, Clients
from server.ledger import Ledger
from server.records import (
    SampleImages,
    data_record,
    divergence,
    failed_rounds,
    round_record,
    run_summary,
    spent_budget,
    start_record,
    unlearned,
)
from server.runner import RoundRunner
from server.secure_ranges import check_secure_settings
from tofu.compression import payload_notes
from tofu.data import FederatedData
from tofu.errors import RunError, SettingError, TofuError
from tofu.flower.in_process import InProcessGrid, run_in_process
from tofu.flower.internals import is_simulation
from tofu.flower.log_filter import show_errors_in_one_line
from tofu.flower.transport import GridTransport
from tofu.formatting import printable, shortened
from tofu.local_layers import keep_local
from tofu.log import start_logging
from tofu.models.behavior import output_sketch
from tofu.models.checks import check_batches, check_builds, eager_code
from tofu.models.initial_weights import fill
from tofu.observers.base import Observer, Observers
from tofu.observers.json_lines import JsonLinesLog
from tofu.observers.prometheus import PrometheusMetrics
from tofu.observers.report import ReportWriter
from tofu.observers.terminal import make_progress
from tofu.observers.trackers import make_trackers
from tofu.privacy import Accountant
from tofu.recording import Recorder
from tofu.reference_model import ReferenceModel
from tofu.reporting.folder import RunFolder
from tofu.reporting.run_settings import portable_settings
from tofu.rounds.links import LinkSimulator
from tofu.rounds.record import RoundRecord, RunSummary, from_dict, round_label, to_dict
from tofu.rounds.schedule import make_schedule
from tofu.settings import Settings
from tofu.settings.fields import names_to_text
from tofu.settings.unused import unused_notes
from tofu.workload import NamedWorkload, RowWorkload, Workload, data_description, workload_of

app = ServerApp()

MAX_CLIENT_BYTES = 2**30
"""Limit of the clients' state in a checkpoint of an in-process run; above it, resumed clients start without state."""

_CLIENT = "client "
_NAMED = 4
"""Number of files and columns left out that a note names; `data.json` has all."""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of a disk that is full or broken."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry point of `flwr run`; an error that a user can act on ends the run as failed, with one line on stderr."""
    try:
        settings = Settings.of(context.run_config)
        notes = tuple(unused_notes(settings))
        serve(grid, settings, make_progress(sys.stderr, quiet=settings.run.log == "json", notes=notes))
    except TofuError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        error.shown = True
        show_errors_in_one_line()
        raise  # Flower counts every other end, even SystemExit, as success


def serve(grid: Grid, settings: Settings, observer: Observer, workload: Workload | None = None) -> RunSummary:
    """Run the whole federation.

    Args:
        observer: receives the events of the run, after the report, the log, the Prometheus metrics and the trackers.
        workload: data and model; by default those that the settings name.

    Raises:
        TofuError: a setting or the data cannot be used, a round got no valid reply, no round succeeded, all secure
            rounds were abandoned, or training had diverged at the end. The run folder keeps the rounds.
    """
    start_logging(settings.run.log)
    _check_clients(grid, settings)
    metrics = PrometheusMetrics(grid.run.run_id, settings)
    tracked = make_trackers(settings.run.tracker, lambda text: observers.on_note(text))
    observers = Observers((ReportWriter(), JsonLinesLog(grid.run.run_id), metrics, *tracked, observer))
    try:
        with eager_code():
            run = _Run(grid, settings, observers, workload or workload_of(settings))
            metrics.serve(settings.run.metrics_port)
            return run.run()
    except BaseException as error:
        observers.on_run_error(error)
        raise
    finally:
        observers.close()


def _check_clients(grid: Grid, settings: Settings) -> None:
    """Raises SettingError if a simulation has another number of nodes than clients: some data would not be used."""
    simulated, nodes = is_simulation(grid), len(list(grid.get_node_ids()))
    if simulated and nodes != settings.data.clients:
        accepted = f"{nodes}, the number of supernodes of this simulation (options.num-supernodes)"
        raise SettingError("clients", settings.data.clients, accepted)
    if simulated or isinstance(grid, InProcessGrid):
        settings.check_recorded()


def serve_in_process(
    client_app: ClientApp, settings: Settings, observer: Observer | None = None, workload: Workload | None = None
) -> dict[str, Any]:
    """Run this server app and a client app in this process, without ray and without opening a port.

    Args:
        workload: the one that the client app was made with (`client.app.make_app`).

    Returns:
        The run's summary, as in summary.json.

    Raises:
        TofuError: as `serve` does.
    """
    if workload is None and settings.data.kind == "images":
        FederatedData.of(settings.data, settings.run.seed).check_images()
    summaries: list[RunSummary] = []
    server_app = ServerApp()

    @server_app.main()
    def run(grid: Grid, context: Context) -> None:
        summaries.append(serve(grid, Settings.of(context.run_config), observer or Observer(), workload))

    run_in_process(
        server_app,
        client_app,
        run_config=settings.to_config(),
        num_supernodes=settings.data.clients,
        workers=settings.run.workers,
    )
    return to_dict(summaries[0])


def _read_note(data: Mapping[str, Any], *, local: bool) -> str:
    """Return which data the server reads; with `local`, the simulated clients train on a part of them."""
    unused = "" if local else " (which the server does not use)"
    text = f"reads {data['read_as']}: {data['train']} to train{unused} and {data['test']} to test, of the classes "
    return text + shortened(data["classes"])


class _Run:
    """One run: its runner and the files that it writes. The constructor refuses settings that are not usable."""

    def __init__(self, grid: Grid, settings: Settings, observer: Observer, workload: Workload) -> None:
        self._began = time.perf_counter()
        torch.set_num_threads(settings.run.threads)
        self._grid, self._observer, self._ledger = grid, observer, Ledger()
        self._introduced: tuple[Client, ...] = ()
        self._counted = (0, 0, 0)
        self._transport = GridTransport(grid)
        self._prepare(settings, workload)

    def _prepare(self, settings: Settings, workload: Workload, clients: Clients | None = None) -> None:
        """Build the model and what depends on it. Raises SettingError for settings that are not usable."""
        self._settings, self._workload = settings, workload
        shape = workload.shape
        built, outputs = workload.build_model(shape).eval(), b""
        if ":" in settings.model.model:  # a user's model
            call, other = partial(workload.outputs, shape=shape), workload.build_model(shape).eval()
            check_builds(built, other, call, settings.model.model)
            check_batches(other, partial(call, other), settings.model.model)  # passes that clients do not make
            outputs = output_sketch(built, call)
        network = ReferenceModel(keep_local(built, settings.training.local_layers), shape)
        own = settings.model.initial_weights
        self._random = fill(workload.build_model(shape), own) if own else ()
        test = workload.test()
        kinds = make_schedule(settings.rounds, settings.training.rounds).kinds
        if "secure" in kinds:
            check_secure_settings(settings)
        self._runner = RoundRunner(
            self._transport, network, test, settings, self._ledger, self._observer, workload, clients, outputs,
            one_machine=is_simulation(self._grid) or isinstance(self._grid, InProcessGrid),
        )  # fmt: skip
        self._notes = payload_notes(settings, self._runner.models[0].reference) if "compressed" in kinds else ()
        if not settings.run.resume and spent_budget(self._runner, 1):
            first = Accountant(settings.privacy.privacy_delta)
            first.spend(settings.privacy.noise_multiplier, self._runner.kind(1))
            accepted = f"at least {first.epsilon:.4g}, the epsilon of one round"
            raise SettingError("max-epsilon", settings.privacy.max_epsilon, accepted)
        self._recorder = Recorder(Path(), settings.run.recorded, settings=portable_settings(settings), shape=shape)
        self._samples = SampleImages(workload, test, real=settings.run.report_images)

    def run(self) -> RunSummary:
        with closing(RunFolder(self._settings)) as folder:
            missing = self._register(folder)
            self._announce(folder)
            self._runner.on_spend = folder.write_account
            try:
                return self._run(folder, missing)
            except OSError as error:
                if error.errno not in _DISK:
                    raise
                reason = f"the run folder {folder.path} cannot be written ({error.strerror})"
                raise RunError(f"round {self._runner.round}: {reason}") from error
            except TofuError as error:
                folder.write_failure(str(error))
                raise

    def _register(self, folder: RunFolder) -> RunError | None:
        """Wait for the clients of a new run whose classes may grow, and grow them to those of all clients.

        Returns:
            Why there are too few clients, if there are.

        Raises:
            RunError: the model cannot have these classes.
        """
        settings, clients = self._settings, self._runner.clients
        data = settings.data
        if settings.run.resume or data.class_names or data.subpopulations or not clients.class_names:
            return None
        server, before = settings.server, clients.class_names
        try:
            clients.register(min_clients=server.min_clients, timeout=server.round_timeout)
        except RunError as error:
            return error
        if clients.class_names != before:
            grown = settings.replace(class_names=names_to_text(clients.class_names))
            try:
                self._prepare(grown, workload_of(grown), clients)
            except SettingError as error:
                own = names_to_text(before)
                raise RunError(
                    f"clients have classes that {data.dataset} lacks, and {error}; class-names={printable(own)} "
                    "leaves these clients out"
                ) from error
            folder.write_config(grown)
        return None

    def _announce(self, folder: RunFolder) -> None:
        """Say what the run does that its settings do not show."""
        settings, observer = self._settings, self._observer
        if settings.run.recorded:
            self._runner.open.recorder = self._recorder.in_folder(folder.path)
            names = ", ".join(settings.run.recorded)
            observer.on_note(
                f"records the messages of client {names} in {folder.path}/record; protect them like its data"
            )
        name = f"{settings.model.model} on {settings.data.dataset}"
        if isinstance(self._workload, NamedWorkload | RowWorkload):
            preprocessing_fields = self._workload.preprocessing if isinstance(self._workload, NamedWorkload) else {}
            folder.write_model_json(self._workload.data.class_names, preprocessing_fields)
        observer.on_run_start(settings.training.rounds, settings.data.clients, name)
        if self._random:
            missing = ", ".join(self._random)
            observer.on_note(f"not in {settings.model.initial_weights}, so at random values: {missing}")
        for note in self._notes:
            observer.on_note(note)
        self._note_data()

    def _run(self, folder: RunFolder, missing: RunError | None) -> RunSummary:
        done = self._resume(folder) if self._settings.run.resume else None
        if done is None:
            score = self._runner.evaluate()
            folder.add_round(start_record(score, time.perf_counter() - self._began, self._notes))
        if done is not None:
            self._counted = self._totals()
        earlier = sum(record.seconds or 0.0 for record in folder.records()) if done is not None else 0.0
        self._observer.on_history(folder.path, folder.records())
        if missing is not None:
            raise missing
        stopped = ""
        for round_ in range((done or 0) + 1, self._settings.training.rounds + 1):
            if stopped := spent_budget(self._runner, round_):
                self._observer.on_note(stopped)
                break
            self._round(folder, round_)
        seconds = earlier + time.perf_counter() - self._began
        failed = failed_rounds(folder.records())
        if self._runner.account is not None:  # with noise, what was wanted: a note says so
            self._note_noise(folder)
        elif not failed:
            failed = self._divergence(folder)
        summary = run_summary(
            self._runner, self._ledger, stopped=stopped or failed, folder=str(folder.path), seconds=seconds
        )
        folder.write_summary(summary)
        keep_last_checkpoint(folder.path)
        if failed:
            raise RunError(f"{failed}{f' ({stopped})' if stopped else ''}; the run is in {folder.path}")
        self._observer.on_run_end(summary)
        return summary

    def _note_data(self) -> None:
        """Report which data were read, and which were left out."""
        data = data_description(self._workload)
        if data.get("read_as"):
            local = is_simulation(self._grid) or isinstance(self._grid, InProcessGrid)
            self._observer.on_note(_read_note(data, local=local))
        if data.get("left_out"):
            self._observer.on_note(f"left out: {shortened(data['left_out'], _NAMED)}; data.json has all")

    def _write_data(self, folder: RunFolder) -> None:
        """Write data.json again after clients came, and name what these leave out if they are in this process."""
        known = {client.name for client in self._introduced}
        self._introduced = self._runner.introduced
        data = data_record(self._runner, self._workload, local=isinstance(self._grid, InProcessGrid))
        folder.write_data(data)
        new = (entry for name, entry in data["clients"].items() if name not in known)
        left_out = [text for entry in new for text in entry.get("left_out", ())]
        if left_out:
            self._observer.on_note(f"left out: {shortened(left_out, _NAMED)}; data.json has all")

    def _round(self, folder: RunFolder, round_: int) -> None:
        began, ledger, runner = time.perf_counter(), self._ledger, self._runner
        before = self._counted
        try:
            result = runner.run_round(round_)
        except BaseException:
            folder.add_messages(ledger.take())
            raise
        label = round_label(result.kind, self._settings.codec.compressor)
        self._observer.on_phase(round_, label, "evaluate", 0, 1)
        score = runner.evaluate()
        self._samples.add(result)
        messages = ledger.take()
        self._counted = self._totals()
        record = round_record(runner, ledger, result, score, before, time.perf_counter() - began)
        links = LinkSimulator(self._settings.link, self._settings.run.seed)
        record = dataclasses.replace(record, link_seconds=links.seconds(messages))
        if self._settings.run.checkpoint:
            self._checkpoint(folder, record, messages)
        folder.add_round(record, messages)
        runner.write_model(folder)
        if runner.introduced != self._introduced:
            self._write_data(folder)
        folder.write_samples(self._samples.arrays)
        folder.write_panels(runner.plugins.panels())
        self._observer.on_round_end(record)
        if diverged := self._divergence(folder):
            self._observer.on_note(f"round {round_}: {diverged}", round=round_)

    def _totals(self) -> tuple[int, int, int]:
        """Return the bytes so far: uplink, downlink and FedAvg's uplink."""
        return self._ledger.uplink, self._ledger.downlink, self._ledger.fedavg_uplink

    def _divergence(self, folder: RunFolder) -> str:
        """Return how training has diverged so far, and what may help; "" if it has not."""
        diverged = divergence(folder.records(), self._workload.shape.classes, growth=self._runner.growth)
        advice = "a smaller lr may help" if self._runner.account is None else self._less_noise()
        return f"{diverged}; {advice}" if diverged else ""

    def _note_noise(self, folder: RunFolder) -> None:
        """Note that a run with noise ended without having learned, unless its last round was noted as diverged."""
        records, parameters = folder.records(), self._runner.models[0].reference.param_spec.parameter_count
        guessed = unlearned(records, self._workload.shape.classes)
        # The noise of the mean is longer than any clipped update: a short run without much noise learns little, too.
        length = self._settings.privacy.noise_multiplier * math.sqrt(parameters)
        if guessed and length > records[-1].clients and not self._divergence(folder):
            self._observer.on_note(f"{guessed}; {self._less_noise()}")

    def _less_noise(self) -> str:
        privacy = self._settings.privacy
        noise = f"clip-norm {privacy.clip_norm:g}, noise-multiplier {privacy.noise_multiplier:g}"
        return (
            f"the noise ({noise}) is probably too much for so few clients: more clients in a round or a smaller "
            "clip-norm may help, or a smaller noise-multiplier, which raises epsilon"
        )

    def _checkpoint(self, folder: RunFolder, record: RoundRecord, messages: Sequence[Mapping[str, object]]) -> None:
        """Store the state after a round, before any other file is written for the round."""
        snapshot = Snapshot({"row": to_dict(record), "messages": messages})
        self._runner.save(snapshot)
        if isinstance(self._grid, InProcessGrid):
            contexts = self._grid.contexts()
            if sum(map(len, contexts.values())) <= MAX_CLIENT_BYTES:
                snapshot.blobs |= {f"{_CLIENT}{name}": context for name, context in contexts.items()}
        write_checkpoint(folder.path, self._runner.round, snapshot)

    def _resume(self, folder: RunFolder) -> int | None:
        """Restore the last checkpoint and return its round, or None if there is no checkpoint."""
        snapshot = read_checkpoint(folder.path, self._observer.on_note)
        if snapshot is None:
            folder.rewind(None)
            self._restore_account(folder)
            return None
        contexts = {name.removeprefix(_CLIENT): b for name, b in snapshot.blobs.items() if name.startswith(_CLIENT)}
        kept = isinstance(self._grid, InProcessGrid) and bool(contexts)
        if isinstance(self._grid, InProcessGrid) and kept:
            self._grid.restore_contexts(contexts)
        self._runner.restore(snapshot, clients_kept=kept)
        self._restore_account(folder)
        record = from_dict(RoundRecord, snapshot.plain["row"], "checkpoint")
        folder.rewind(record, snapshot.plain["messages"])
        self._runner.write_model(folder)
        self._samples.restore(folder.read_samples(), record.round)
        lost = "" if kept else "; clients start without error feedback"
        self._observer.on_note(f"resumes after round {record.round}{lost}")
        return record.round

    def _restore_account(self, folder: RunFolder) -> None:
        """Restore the privacy account, which includes rounds that did not finish but may have released updates."""
        if self._runner.account is not None and (written := folder.read_account()) is not None:
            self._runner.restore_spent(written)
