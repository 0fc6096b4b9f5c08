"""Builds the records of a run from the runner's results."""

import math
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch

from server.ledger import Ledger
from server.runner import RoundResult, RoundRunner
from tofu.data import LabeledImages
from tofu.evaluation import ClassCounts, Evaluation
from tofu.formatting import format_fraction
from tofu.rounds.record import QUANTILES, ClassRecord, ClientRecord, Failure, RoundRecord, RunSummary
from tofu.tasks import backward_transfer, mean_accuracy, round_context
from tofu.weights import weights_sha256
from tofu.wire import CLIENT_ACCURACY
from tofu.workload import NamedWorkload, Workload, data_description

Arrays = Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]
_MAX_REAL = 16
_DIVERGED, _EXPLODED, _GROWN = 100.0, 5.0, 10.0
_LEARNED, _LITTLE, _GUESSING = 0.25, 0.1, 0.05
"""Fractions of the accuracies above guessing."""


def start_record(score: Evaluation, seconds: float, notes: tuple[str, ...] = ()) -> RoundRecord:
    """Round 0: the evaluation before training, and notes on what the rounds will send."""
    accuracy, loss = _finite(score.accuracy), _finite(score.loss)
    return RoundRecord(
        0, "start", accuracy=accuracy, loss=loss, metrics=dict(score.metrics), seconds=seconds, notes=notes
    )


def round_record(
    runner: RoundRunner, ledger: Ledger, result: RoundResult, score: Evaluation, before: tuple[int, int, int],
    seconds: float,
) -> RoundRecord:  # fmt: skip
    """Return the record of a round.

    Args:
        score: of the model after the round.
        before: uplink, downlink and FedAvg uplink bytes before the round.
    """
    private, secure = runner.account, result.secure
    compressed, masked = result.kind == "compressed", result.kind == "secure"
    tasks = runner.settings.plugins.task_count > 1
    return RoundRecord(
        round=result.round,
        kind=result.kind,
        compressor=runner.settings.codec.compressor if compressed else "",
        accuracy=_finite(score.accuracy),
        loss=_finite(score.loss),
        metrics=dict(score.metrics),
        clients=len(result.survivors) if masked else len(result.replies),
        failures=tuple(Failure(name, reason, str(result.nodes[name])) for name, reason in result.failures.items()),
        explained_variance=result.mean("explained_variance") if compressed else None,
        cosine=result.mean("cosine") if compressed else None,
        with_proxies=result.with_proxies,
        step_explained_variance=result.step_explained_variance,
        server_step=result.server_step,
        # Losses carry no noise, so they are not recorded under differential privacy.
        train_loss=None if private else secure.loss if secure else result.mean("train_loss"),
        train_seconds=result.mean("train_seconds"),
        encode_seconds=result.mean("encode_seconds"),
        uplink_bytes=ledger.uplink - before[0],
        downlink_bytes=ledger.downlink - before[1],
        fedavg_uplink_bytes=ledger.fedavg_uplink - before[2],
        seconds=seconds,
        epsilon=runner.epsilons[0],
        model_epsilon=runner.epsilons[1],
        clip_norm=result.clip_norm if private and runner.settings.privacy.clip_quantile else None,
        by_client=_by_client(result, compressed=compressed, private=private is not None),
        plugins=result.plugin_metrics(),
        task=round_context(runner.settings, runner.models[0].shape, result.round).task if tasks else None,
        task_accuracies=tuple(runner.task_accuracies[-1]) if tasks else (),
        group_accuracies=tuple(runner.group_accuracies[-1]) if runner.group_accuracies else (),
        clipped=secure.clipped if secure else None,
        largest_clipped=secure.largest_clipped if secure else None,
        abandoned=result.abandoned,
        late=result.late if runner.settings.server.over_sampling > 1 else None,
        accuracy_quantiles=_quantiles(result),
    )


def data_record(runner: RoundRunner, workload: Workload, *, local: bool) -> dict[str, Any]:
    """Return the content of data.json.

    Args:
        local: the clients run in this process. Otherwise the record holds only what clients sent, which has no file
            names.
    """
    private = runner.account is not None
    clients: dict[str, object] = {}
    for client in runner.introduced:
        entry: dict[str, object] = {} if private else {"examples": client.examples, "unreadable": client.unreadable}
        if client.classes:
            entry["classes"] = list(client.classes)
        elif local and not private and isinstance(workload, NamedWorkload) and client.name.isdecimal():
            data = workload.data.client(int(client.name))
            entry["images"] = torch.bincount(data.labels, minlength=data.classes).tolist()
            entry["left_out"] = list(data.unreadable)
        clients[client.name] = entry
    described = dict(data_description(workload))
    train = set(described.get("train_left_out", ()))
    unreadable = [text for text in getattr(workload.test(), "unreadable", ()) if text not in train]
    return described | {"test_left_out": unreadable, "clients": clients}


def _finite(value: float) -> float | None:
    """Return the value, or None if it could not be measured."""
    return value if math.isfinite(value) else None


def _quantiles(result: RoundResult) -> dict[str, float | None]:
    """Quantiles of the clients' accuracies on their own test data, by percent; empty without any."""
    found = [metrics[CLIENT_ACCURACY] for metrics in result.metrics.values() if CLIENT_ACCURACY in metrics]
    if not found:
        return {}
    return {str(percent): float(np.quantile(found, percent / 100)) for percent in QUANTILES}


def _by_client(result: RoundResult, *, compressed: bool, private: bool) -> tuple[ClientRecord, ...]:
    return tuple(
        ClientRecord(
            client.name,
            str(client.node),
            explained_variance=reply.explained_variance if compressed else None,
            examples=None if private else reply.examples,
            train_seconds=reply.train_seconds,
            encode_seconds=reply.encode_seconds,
            test_accuracy=result.metrics.get(client.name, {}).get(CLIENT_ACCURACY),
        )
        for client, reply in result.replies
    )


def run_summary(runner: RoundRunner, ledger: Ledger, *, stopped: str, folder: str, seconds: float) -> RunSummary:
    """Return the summary of a finished run; `stopped`: why it ended before its last round, or ""."""
    transfer = _transfer(runner)
    return RunSummary(
        final_accuracy=_finite(runner.accuracies[-1]),
        rounds=runner.round,
        uplink_bytes=ledger.uplink,
        downlink_bytes=ledger.downlink,
        fedavg_uplink_bytes=ledger.fedavg_uplink,
        fedavg_downlink_bytes=ledger.fedavg_downlink,
        uplink_ratio=ledger.ratio(),
        both_ratio=ledger.both_ratio(),
        payload_ratio=ledger.payload_ratio(),
        weights_sha256=weights_sha256(runner.weights),
        mean_accuracy=transfer[0] if transfer else None,
        backward_transfer=transfer[1] if transfer else None,
        epsilon=runner.epsilons[0],
        model_epsilon=runner.epsilons[1],
        delta=runner.settings.privacy.privacy_delta if runner.account else None,
        stopped=stopped,
        unreadable=runner.unreadable,
        declined=runner.clients.declined,
        run=folder,
        seconds=seconds,
        by_class=_by_class(runner.by_class, runner.clients.class_names),
    )


def _by_class(counts: ClassCounts, names: Sequence[str]) -> tuple[ClassRecord, ...]:
    return tuple(
        ClassRecord(names[number] if number < len(names) else str(number), samples, counts.right[number])
        for number, samples in sorted(counts.samples.items())
        if number >= 0
    )


def failed_rounds(records: Sequence[RoundRecord]) -> str:
    """Return why a run with these rounds has failed (no round or no secure round succeeded), or ""."""
    rounds = [record for record in records if record.kind != "start"]
    secure = [record for record in rounds if record.kind == "secure"]
    if not any(record.clients for record in rounds):
        text, failed = "no round succeeded, so the model is untrained", rounds
    elif secure and not any(record.clients for record in secure):
        text, failed = "no secure round succeeded", secure
    else:
        return ""
    reason = next((record.abandoned for record in reversed(failed) if record.abandoned), "")
    return f"{text}: {reason}" if reason else text


def divergence(records: Sequence[RoundRecord], classes: int, *, growth: float = 1.0) -> str:
    """Return how training has diverged in these rounds, or "" if it has not.

    Training has diverged if the weights or the last test loss are not finite, or this loss is above 100 times the
    initial one (taken as at least 1). It has also diverged if the last test loss is above the initial one, the accuracy
    is that of guessing, and one of three conditions holds: an earlier round was at least a quarter of the way from
    guessing to perfect accuracy, the norm of the weights is above 10 times the initial one, or the training loss is
    above 5 times the initial test loss (taken as at least 1). Without test data, the training loss is compared with the
    loss of guessing, or with that of the first round if the model does not classify.

    Args:
        classes: number of classes; 1 if the model does not classify.
        growth: norm of the last round's weights, as a multiple of that at the start.
    """
    start, last = records[0], records[-1]
    if not math.isfinite(growth):
        return "training diverges: the weights are not finite"
    if start.loss is None:  # there are no test data, or nothing that could be measured
        losses = [record.train_loss for record in records if record.train_loss is not None]
        first = math.log(classes) if classes > 1 else (losses or [0.0])[0]
        if losses and losses[-1] > _DIVERGED * max(first, 1.0):
            return f"training diverges: the training loss is {losses[-1]:.3g}, at the start it was {first:.3g}"
        return ""
    found = "not finite" if last.loss is None else f"{last.loss:.3g}"
    text = f"training diverges: the test loss is {found}, at the start it was {start.loss:.3g}"
    if last.loss is None or last.loss > _DIVERGED * max(start.loss, 1.0):
        return text
    guessing = 1 / classes
    best = max((record.accuracy or 0.0 for record in records), default=0.0)
    lost = _below(last, classes, _GUESSING)
    learned = best >= guessing + _LEARNED * (1 - guessing)
    exploded = growth > _GROWN or (last.train_loss or 0.0) > _EXPLODED * max(start.loss, 1.0)
    if lost and not last.task_accuracies and last.loss > start.loss and (learned or exploded):
        return f"{text}; the accuracy was {best:.3g} and is {last.accuracy:.3g}, that of guessing"
    return ""


def unlearned(records: Sequence[RoundRecord], classes: int) -> str:
    """Return that the last accuracy is little better than guessing, or "". One task after the other is not judged."""
    last = records[-1]
    if classes < 2 or not last.round or last.task_accuracies or not _below(last, classes, _LITTLE):
        return ""
    accuracy, guessing = format_fraction(last.accuracy or 0.0), format_fraction(1 / classes)
    return f"the final accuracy, {accuracy}, is little better than that of guessing, {guessing}"


def _below(record: RoundRecord, classes: int, fraction: float) -> bool:
    """Whether the accuracy is measured, and at most this fraction of the way from guessing to perfect accuracy."""
    guessing = 1 / classes
    return record.accuracy is not None and record.accuracy <= guessing + fraction * (1 - guessing)


def _transfer(runner: RoundRunner) -> tuple[float, float] | None:
    """Return ACC and BWT (`tofu.tasks`), averaged over the orders in which the clients learned the tasks."""
    settings, stream = runner.settings, runner.stream
    if stream.tasks < 2 or runner.round < settings.training.rounds:
        return None
    each = settings.training.rounds // stream.tasks
    after = torch.tensor(runner.task_accuracies[each::each])  # [tasks, tasks]: after each task, on each task
    orders = [[stream.number(at, str(client)) for at in range(stream.tasks)] for client in range(settings.data.clients)]
    matrices = [after[:, order] for order in orders]
    found = [sum(map(measure, matrices)) / len(matrices) for measure in (mean_accuracy, backward_transfer)]
    return found[0], found[1]


def spent_budget(runner: RoundRunner, round_: int) -> str:
    """Return why differential privacy does not allow another round, or ""."""
    privacy, account = runner.settings.privacy, runner.account
    if account is None or not privacy.max_epsilon or account.allows(privacy.noise_multiplier, privacy.max_epsilon):
        return ""
    if runner.noise is not None and not runner.noise.participation.may_return:
        return ""
    spent = f"{account.epsilon:.4g}" if math.isfinite(account.epsilon) else "unbounded"
    return f"the privacy budget does not allow round {round_}: epsilon is {spent}, max-epsilon {privacy.max_epsilon:g}"


class SampleImages:
    """Images for the report: the proxies of one client in the first and the last round.

    Args:
        real: whether to add some real images, which reveal examples of the data.
    """

    def __init__(self, workload: Workload, test: Sized, *, real: bool = False) -> None:
        self.arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {}
        if real and isinstance(test, LabeledImages):
            self.arrays = {"real": test.images[:_MAX_REAL].numpy(), "real_caption": np.array("test images")}
        self._data = workload.data if real and isinstance(workload, NamedWorkload) else None
        self._real = real
        self._rounds: list[str] = []

    def restore(self, arrays: Arrays, round_: int) -> None:
        """Take over the images of an earlier process up to a round."""
        rounds = {int(name.removeprefix("proxies_")): name for name in arrays if name.startswith("proxies_")}
        self._rounds = [name for number, name in sorted(rounds.items()) if number <= round_]
        if self._rounds:
            kept = (*(("real", "real_caption") if self._real else ()), *self._rounds)
            self.arrays |= {name: value for name, value in arrays.items() if name in kept}

    def add(self, result: RoundResult) -> None:
        """Keep the proxies of this round and of the first round that had any."""
        if result.proxies is None or result.proxies.dim() != 4:  # proxies of vectors or signals are no images
            return
        if self._data and not self._rounds and result.shown.isdecimal() and int(result.shown) < self._data.clients:
            self.arrays["real"] = self._data.client(int(result.shown)).images[:_MAX_REAL].numpy()
            self.arrays["real_caption"] = np.array(
                f"images of client {result.shown} (available because one dataset was split among all clients)"
            )
        for old in self._rounds[1:]:
            del self.arrays[old]
        key = f"proxies_{result.round}"
        self._rounds = [*self._rounds[:1], key]
        self.arrays[key] = result.proxies.numpy()
