"""The federation's rounds: ask, decode as replies arrive, average, step, evaluate.

This is written on Flower's Grid rather than on its Strategy base, whose `start` always begins at round 1, waits for all
replies before it aggregates any, and hides which node failed.
"""

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor, nn

from server.checkpoint import Snapshot
from server.client_registry import Client, Clients, exchange, one_line
from server.downlink import Downlink, Parts
from server.ledger import Ledger
from server.optimizer import ServerOptimizer
from server.secure_round import AbandonedError, OpenRound, SecureRounds
from tofu.data import LabeledImages
from tofu.device import open_device
from tofu.errors import PayloadError, RunError
from tofu.evaluation import Evaluation, evaluate
from tofu.models import build_model
from tofu.observers.terminal import Progress
from tofu.payload import HEADER_BYTES, read_payload
from tofu.plugins import MAX_STATE_BYTES, Export, SumSpec, export_from_bytes
from tofu.privacy import Accountant, check_param_spec
from tofu.recording import Recorder
from tofu.reference_model import ReferenceModel
from tofu.reporting.folder import RunFolder
from tofu.rng import derive_generator
from tofu.rounds.aggregation import RunningMean
from tofu.rounds.schedule import Schedule
from tofu.secagg.encoding import SecureMean, flat
from tofu.settings import MIN_SECURE, Settings
from tofu.tasks import only_classes
from tofu.weights import Weights, load_weights, weights_of
from tofu.wire import FIELD, RECORD, RESYNC, TrainReply, TrainRequest, broadcast_id

_WINDOW = 256
"""Messages on their way at a time, so that a round with many clients does not hold a model for each of them."""


@dataclass
class RoundResult:
    """What one round did.

    Attributes:
        replies: (client, its reply without the payload) of every client that was added.
        failures: client name -> one line that says why it was not.
        nodes: client name -> node, of all that were asked.
        shown: name of the client whose proxies are kept for the report.
        proxies: images [n, c, h, w] that it sent, in a proxy round.
        step_explained_variance: of the server's compressed step to this round's weights; None where it sent them whole.
        broadcast: of the plugins, as every train request carries it.
        exports: client name -> what its plugins sent, in a round that is not secure.
        asks_keys: whether train requests ask for keys for a secure round.
        parts: client name -> what its train request carries in a secure round.
        secure: what a secure round learnt; None in others, and where it was abandoned.
        survivors: names of the clients in that sum.
        abandoned: why a secure round came to nothing, or "".
    """

    round: int
    kind: str
    shown: str
    replies: list[tuple[Client, TrainReply]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    proxies: Tensor | None = None
    step_explained_variance: float | None = None
    broadcast: bytes = b""
    exports: dict[str, Export] = field(default_factory=dict)
    asks_keys: bool = False
    parts: Mapping[str, bytes] = field(default_factory=dict)
    secure: SecureMean | None = None
    survivors: tuple[str, ...] = ()
    abandoned: str = ""

    def plugin_metrics(self) -> dict[str, float]:
        """The plugins' metrics, averaged like `mean`. Secure rounds have none."""
        values: dict[str, list[tuple[float, int]]] = {}
        for client, reply in self.replies:
            for name, value in self.exports.get(client.name, Export()).metrics.items():
                values.setdefault(name, []).append((value, reply.examples))
        return {
            name: sum(value * weight for value, weight in some) / sum(weight for _, weight in some)
            for name, some in sorted(values.items())
        }

    def mean(self, name: str) -> float | None:
        """A metric of the replies, averaged with their numbers of examples as weights; None without replies."""
        total = sum(reply.examples for _, reply in self.replies)
        if not total:
            return None
        return float(sum(getattr(reply, name) * reply.examples for _, reply in self.replies) / total)


class RoundRunner:
    """The state of a run on the server and its rounds.

    Args:
        network: the global model at its initial weights, which the rounds change in place.
        test: held-out images.
    """

    def __init__(
        self,
        grid: Grid,
        network: ReferenceModel,
        test: LabeledImages,
        settings: Settings,
        ledger: Ledger,
        progress: Progress,
    ) -> None:
        self.settings, self._shape = settings, network.shape
        self._grid, self._test, self._ledger, self._progress = grid, test, ledger, progress
        self._clients = Clients(grid, ledger, progress)
        self._schedule = Schedule.of(settings)
        self._device = open_device(settings.device)
        self.plugins = settings.make_plugins()
        self.stream = settings.task_stream(network.shape.classes)
        self._secure = SecureRounds(grid, ledger, settings) if "secure" in self._schedule.kinds else None
        self._acknowledged: dict[str, int] = {}
        self.account = Accountant(settings.privacy_delta) if settings.noise_multiplier else None
        self.accuracies: list[float] = []
        self.task_accuracies: list[list[float]] = []
        self.round = 0
        self.recorder: Recorder | None = None
        self._broadcasts: dict[str, bytes] = {}
        first = ReferenceModel.of(network.model, network.shape, self.plugins, settings.round_context(network.shape, 1))
        self._equip(first, flat(weights_of(first.model)))

    def _equip(self, network: ReferenceModel, initial: Tensor, averaged: nn.Module | None = None) -> None:
        """Begin with a network: all that depends on the names and shapes of its parameters is made anew.

        Args:
            initial: the weights that clients build it with, as one vector.
        """
        if self.settings.noise_multiplier:
            check_param_spec(network.param_spec)
        self.network, self._initial = network, initial
        self._optimizer = ServerOptimizer(network.model, self.settings)
        kinds = set(self._schedule.kinds) - {"secure"}
        self._compressors = {kind: self.settings.make_compressor(kind, network) for kind in kinds}
        self._downlink = Downlink(network, self.settings)
        self._averaged = averaged or (copy.deepcopy(network.model) if self.settings.ema_decay else network.model)
        if self._secure is not None:
            self._secure.begin(network.param_spec)

    def _set_up(self, round_: int) -> None:
        """Have the plugins make a round's network, and go over to it where its parameters are others than now."""
        if not self.plugins:
            return
        settings = self.settings
        about = settings.round_context(
            self._shape, min(round_, settings.rounds)
        )  # after the last it is what the run leaves
        built = build_model(settings.model, self._shape, norm=settings.norm, seed=settings.seed)
        fresh = ReferenceModel.of(built, self._shape, self.plugins, about)
        if fresh.param_spec == self.network.param_spec:
            return
        averaged = None
        if self._averaged is not self.network.model:
            averaged = ReferenceModel.of(self._averaged, self._shape, self.plugins, about).model
        network = ReferenceModel.of(self.network.model, self._shape, self.plugins, about)
        network = dataclasses.replace(network, model=network.model.eval(), initial=fresh.initial)
        self._equip(network, flat(weights_of(fresh.model)), averaged)

    def evaluate(self) -> Evaluation:
        """Evaluate the model that the run would end with, and remember the accuracy for the schedule.

        In a run of tasks that is the mean over all tasks, and `task_accuracies` holds them one by one.
        """
        results = []
        for task in range(self.stream.tasks):
            with only_classes(self._averaged, self._heads(task)):
                images = self.stream.images_of(self._test, task)
                results.append(evaluate(self._averaged, images, predict=self.plugins.predict, device=self._device))
        accuracy = sum(result.accuracy for result in results) / len(results)
        self.accuracies.append(accuracy)
        self.task_accuracies.append([result.accuracy for result in results])
        return Evaluation(accuracy, sum(result.loss for result in results) / len(results))

    def _heads(self, task: int) -> Sequence[int]:
        """The outputs that are in the running for a task's images."""
        if self.settings.task_heads == "multi":
            return self.stream.strata_of(task)
        return range(self.network.shape.classes)

    def run_round(self, round_: int) -> RoundResult:
        """One round, counted from 1.

        Raises:
            RunError: too few clients, or no valid reply.
        """
        settings, self.round = self.settings, round_
        known = self._clients.connected(least=settings.min_clients, timeout=settings.round_timeout, round_=round_)
        kind = self._schedule.kind(round_, self.accuracies)
        chosen = self._sample(known, round_, least=MIN_SECURE if kind == "secure" else 1)
        result = RoundResult(round_, kind, shown=chosen[0].name)
        result.nodes = {client.name: client.node for client in chosen}
        result.broadcast = self.plugins.broadcast_bytes(max_bytes=MAX_STATE_BYTES) if self.plugins else b""
        result.asks_keys = result.kind != "secure" and self._schedule.secure_may_follow(round_, self.accuracies)
        self._downlink.begin(round_, whole=result.kind == "full")
        result.step_explained_variance = self._downlink.explained_variance

        end = time.monotonic() + settings.round_timeout
        mean = self._secure_mean if result.kind == "secure" else self._mean
        try:
            update = mean(chosen, result, end)
        finally:
            for name, reason in result.failures.items():
                self._progress.failed(round_, name, result.nodes[name], reason)
        if update is not None:
            before = self.plugins.before_step(self.network.model)
            self._optimizer.step(update)
            self.plugins.on_step(self.network.model, before)
            self._reduce(result)
        self._average(round_)
        if self.account is not None and update is not None:
            self.account.spend(settings.noise_multiplier, kind)
        self._set_up(round_ + 1)
        return result

    def _reduce(self, result: RoundResult) -> None:
        """Give the plugins what the clients' halves exported: totals, in an order that the replies' has no part in."""
        if result.secure is not None:
            sums, examples = result.secure.sums, result.secure.examples
            self.plugins.check_sums(sums, self.network.model, clients=len(result.survivors))
        else:
            examples = sum(reply.examples for _, reply in result.replies)
            exports = [result.exports[client.name] for client, _ in result.replies if client.name in result.exports]
            sums = {name: sum_of(export.sums[name] for export in exports) for name in self._declared()}
        if sums:
            self.plugins.reduce(sums, examples)

    def _declared(self) -> dict[str, SumSpec]:
        return self.plugins.declare_sums(self.network.model)

    def _mean(self, chosen: list[Client], result: RoundResult, end: float) -> Weights:
        """The mean update of a proxy or full round. Raises RunError where no reply is valid."""
        mean = RunningMean()
        self._train(chosen, result, end, lambda client, reply: self._add(client, reply, result, mean))
        if not result.replies:
            reasons = "; ".join(sorted(set(result.failures.values())))
            raise RunError(f"round {result.round}: no valid reply from {len(chosen)} clients ({reasons})")
        result.replies.sort(key=lambda pair: chosen.index(pair[0]))
        return mean.mean()

    def _secure_mean(self, chosen: list[Client], result: RoundResult, end: float) -> Weights | None:
        """The mean update of a secure round, or None where it was abandoned."""
        assert self._secure is not None  # in a run with secure rounds
        self._progress.phase(result.round, "secure", "share", 0, len(chosen))
        try:
            weights = weights_of(self._downlink.network.model)
            opened = self._secure.open(
                chosen, result.round, result.failures, self._declared(), weights, self._initial, result.broadcast
            )
            result.parts = opened.parts
            sharers = [client for client in chosen if client.name in opened.parts]
            self._train(sharers, result, end, lambda client, reply: self._add_masked(client, reply, result, opened))
            self._progress.phase(result.round, "secure", "reveal", 0, len(sharers))
            again = self._schedule.secure_may_follow(result.round, self.accuracies)
            result.secure, result.survivors = self._secure.close(opened, result.failures, again=again)
        except AbandonedError as error:
            result.abandoned = str(error)
            self._progress.note(f"round {result.round} is abandoned: {error}", round=result.round)
            return None
        mean = result.secure
        if mean.clipped:
            self._progress.note(
                f"round {result.round}: {mean.clipped} values of all clients were clipped, the furthest at most "
                f"{mean.furthest:.3g} times its range; what was cut off is sent later",
                round=result.round,
            )
        for name in result.survivors:
            self._acknowledged[name] = result.round
        return mean.update

    def _train(
        self, asked: list[Client], result: RoundResult, end: float, take: Callable[[Client, Message], None]
    ) -> None:
        """Have clients train and take their replies as they come; `take` raises PayloadError for one of no use."""
        lost: list[Client] = []
        done = 0
        self._progress.phase(result.round, result.kind, "train", 0, len(asked))
        silent = {client.name: client for client in asked}
        for whole, some in ((False, asked), (True, lost)):
            for client, reply in self._exchange(some, result, end, whole=whole):
                if not whole and reply.has_error() and reply.error.code == RESYNC:
                    self._count_error(client, reply, result, fedavg=False)
                    reason = one_line(reply.error.reason)
                    self._progress.note(
                        f"round {result.round}: client {client.name} is sent the weights: {reason}",
                        round=result.round,
                        node=client.node,
                    )
                    lost.append(client)
                    continue
                silent.pop(client.name, None)
                try:
                    take(client, reply)
                except PayloadError as error:
                    result.failures[client.name] = str(error)
                done += 1
                self._progress.phase(result.round, result.kind, "train", done, len(asked))
        for name in silent:
            result.failures[name] = f"no reply within {self.settings.round_timeout:g} s"

    def _average(self, round_: int) -> None:
        """Move the running average of the global weights on; early rounds count by their number, not by the share."""
        if self.settings.ema_decay:
            share = min(self.settings.ema_decay, 1 - 1 / round_)
            old, new = weights_of(self._averaged), weights_of(self.network.model)
            load_weights(self._averaged, {name: share * old[name] + (1 - share) * new[name] for name in new})

    def _sample(self, clients: list[Client], round_: int, *, least: int) -> list[Client]:
        """The clients asked in this round: a function of the seed, the round and who is connected."""
        count = max(self.settings.min_clients, round(self.settings.client_fraction * len(clients)), least)
        if count >= len(clients):
            return clients
        generator = derive_generator(self.settings.seed, round_, "sample")
        rows = torch.randperm(len(clients), generator=generator)[:count].sort().values
        return [clients[int(row)] for row in rows]

    def _exchange(
        self, asked: list[Client], result: RoundResult, end: float, *, whole: bool
    ) -> Iterator[tuple[Client, Message]]:
        """Ask clients to train and yield their replies; `whole` for those that could not use the steps they got."""
        full = HEADER_BYTES + self.network.param_spec.float32_bytes
        for start in range(0, len(asked), _WINDOW):
            window = asked[start : start + _WINDOW]
            messages = []
            for client in window:
                parts = self._downlink.parts(client.name, whole=whole)
                message = self._request(client, parts, result, end, whole=whole)
                messages.append(message)
                self._ledger.add(
                    message, round_=result.round, kind=result.kind, direction="downlink", client=client.name,
                    payload_bytes=parts.nbytes, full_payload_bytes=full, fedavg=not whole,
                )  # fmt: skip
            by_node = {client.node: client for client in window}
            for node, reply in exchange(self._grid, messages, end):
                yield by_node[node], reply

    def _request(self, client: Client, parts: Parts, result: RoundResult, end: float, *, whole: bool) -> Message:
        acknowledged = self._acknowledged.get(client.name, -1)
        down, current = self._downlink, broadcast_id(result.broadcast)
        has = not whole and bool(current) and self._broadcasts.get(client.name) == current
        request = TrainRequest(
            result.kind, acknowledged, self._shape, parts.payload, down.identity, parts.steps, down.sketch,
            advert=result.asks_keys, secure=result.parts.get(client.name, b""),
            broadcast=b"" if has else result.broadcast, kept=current if has else b"",
        )  # fmt: skip
        content = RecordDict({RECORD: ConfigRecord({FIELD: request.to_bytes()})})
        ttl = max(1.0, end - time.monotonic())
        return Message(content, client.node, "train", group_id=str(result.round), ttl=ttl)

    def _count_error(self, client: Client, message: Message, result: RoundResult, *, fedavg: bool = True) -> None:
        if message.metadata.src_node_id == client.node:  # else it is the network's own
            self._ledger.add(
                message, round_=result.round, kind=result.kind, direction="uplink", client=client.name, fedavg=fedavg
            )

    def _add(self, client: Client, message: Message, result: RoundResult, mean: RunningMean) -> None:
        """Check, decode and add one reply.

        Raises:
            PayloadError: the reply is an error or cannot be trusted.
        """
        if message.has_error():
            self._count_error(client, message, result)
            raise PayloadError(one_line(message.error.reason))
        reply = TrainReply.from_bytes(_content(message))
        param_spec = self.network.param_spec
        self._ledger.add(
            message, round_=result.round, kind=result.kind, direction="uplink", client=client.name,
            payload_bytes=len(reply.payload), full_payload_bytes=HEADER_BYTES + param_spec.float32_bytes,
        )  # fmt: skip
        if reply.examples > client.examples:
            raise PayloadError(f"reply says {reply.examples} images, the client has {client.examples}")
        compressor = self._compressors[result.kind]
        payload = read_payload(
            reply.payload, codec=compressor.code, round_=result.round, fingerprint=self._downlink.identity,
            max_bytes=HEADER_BYTES + compressor.body_bytes(param_spec),
        )  # fmt: skip
        if self.recorder is not None and self.recorder.wants(client.name):
            base = weights_of(self._downlink.network.model)
            self.recorder.save(
                result.round, client.name, kind=result.kind, examples=reply.examples, base=base, payload=reply.payload
            )
        update = compressor.decompress(self._downlink.network, payload.body)
        export = self._read_export(reply.exported)
        mean.add(update, reply.examples)
        if client.name == result.shown and (content := compressor.describe(payload.body)) is not None:
            result.proxies = content.proxies.images if content.proxies is not None else None
        result.replies.append((client, dataclasses.replace(reply, payload=b"", exported=b"")))
        result.exports[client.name] = export
        self._acknowledged[client.name] = result.round
        self._downlink.delivered(client.name)
        self._broadcasts[client.name] = broadcast_id(result.broadcast)
        if self._secure is not None:
            self._secure.learn(update, reply, result.round)
            self._secure.keep_advert(client, reply.advert)

    def _read_export(self, data: bytes) -> Export:
        """What a client's plugins sent. Raises PayloadError where it is not what they declare."""
        if not self.plugins and not data:
            return Export()
        export = export_from_bytes(data, self._declared())
        try:
            self.plugins.check_sums(export.sums, self.network.model)
        except RunError as error:
            raise PayloadError(str(error)) from error
        return export

    def _add_masked(self, client: Client, message: Message, result: RoundResult, opened: OpenRound) -> None:
        """Check and add one masked vector.

        Raises:
            PayloadError: the reply is an error or cannot be trusted.
        """
        if message.has_error():
            self._count_error(client, message, result)
            raise PayloadError(one_line(message.error.reason))
        self._broadcasts[client.name] = broadcast_id(result.broadcast)
        masked = _content(message)
        full = HEADER_BYTES + self.network.param_spec.float32_bytes
        self._ledger.add(
            message, round_=result.round, kind=result.kind, direction="uplink", client=client.name,
            payload_bytes=len(masked) if isinstance(masked, bytes) else 0, full_payload_bytes=full,
        )  # fmt: skip
        opened.add(client, masked)
        self._downlink.delivered(client.name)

    def save(self, snapshot: Snapshot) -> None:
        """Put all that the next rounds need into a checkpoint."""
        snapshot.blobs["plugins"] = self.plugins.broadcast_bytes(max_bytes=MAX_STATE_BYTES)
        snapshot.put_tensors("model", weights_of(self.network.model))
        snapshot.put_tensors("averaged", weights_of(self._averaged))
        self._optimizer.save(snapshot)
        self._downlink.save(snapshot)
        if self._secure is not None:
            self._secure.save(snapshot)
        snapshot.plain["privacy"] = self.account.to_dict() if self.account else None
        snapshot.plain |= {
            "round": self.round, "accuracies": self.accuracies, "task_accuracies": self.task_accuracies,
            "broadcasts": {name: identity.hex() for name, identity in self._broadcasts.items()},
            "acknowledged": self._acknowledged, "clients": self._clients.state(),
            "ledger": self._ledger.totals(),
        }  # fmt: skip

    def restore(self, snapshot: Snapshot, *, clients_kept: bool) -> None:
        """The inverse of `save`.

        Args:
            clients_kept: the clients have the state that they had then, as those of one process; others begin afresh.
        """
        self.round = int(snapshot.plain["round"])
        if self.account is not None:
            self.account = Accountant.from_dict(snapshot.plain["privacy"])
        self.plugins.load(broadcast=snapshot.blobs["plugins"], max_bytes=MAX_STATE_BYTES)
        self._set_up(self.round + 1)
        load_weights(self.network.model, snapshot.tensors_of("model"))
        load_weights(self._averaged, snapshot.tensors_of("averaged"))
        self._optimizer.restore(snapshot)
        self._downlink.restore(snapshot, clients_kept=clients_kept)
        if self._secure is not None:
            self._secure.restore(snapshot, clients_kept=clients_kept)
        self.accuracies[:] = snapshot.plain["accuracies"]
        self.task_accuracies[:] = snapshot.plain["task_accuracies"]
        self._ledger.restore(snapshot.plain["ledger"])
        if clients_kept:
            self._acknowledged = dict(snapshot.plain["acknowledged"])
            self._broadcasts = {name: bytes.fromhex(text) for name, text in snapshot.plain["broadcasts"].items()}
            self._clients.restore(snapshot.plain["clients"])

    def write_model(self, folder: RunFolder) -> None:
        """Write the model that the run would end with."""
        state = b""
        if self.plugins:
            state = self.plugins.calibrated_bytes(self._averaged, self._test, max_bytes=MAX_STATE_BYTES)
        folder.write_model(self.weights, self._shape, state)

    @property
    def weights(self) -> Weights:
        """A copy of the weights that the run would end with: the global ones, or their running average."""
        return weights_of(self._averaged)


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum, added up in their order."""
    return functools.reduce(torch.add, tensors)


def _content(message: Message) -> object:
    record = message.content.config_records.get(RECORD)
    return record.get(FIELD) if record is not None else None
