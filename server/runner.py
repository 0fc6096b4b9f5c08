"""The rounds of a run: sample clients, collect their updates, step the global model, average, account.

This uses Flower's Grid and not its Strategy base class, whose `start` always begins at round 1, waits for all replies
before it aggregates any, and hides which node failed.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from random import SystemRandom

import torch

from server.checkpoint import Snapshot
from server.client_registry import Client, Clients
from server.collector import Collected, Collector, OpenCollector, RoundState, TrainExchange
from server.evaluator import Evaluator
from server.global_model import GlobalModel
from server.ledger import Ledger
from server.secure_ranges import known_identities
from server.secure_round import SecureCollector
from server.server_noise import ServerNoise
from server.stragglers import Stragglers
from tofu.evaluation import ClassCounts, Evaluation
from tofu.flower.transport import Transport
from tofu.models import run_model
from tofu.observers.base import Observer
from tofu.plugins import MAX_STATE_BYTES
from tofu.privacy import Accountant
from tofu.privacy.adaptive import clip_norm, plugins_of
from tofu.privacy.correlated import Participation
from tofu.reference_model import ReferenceModel
from tofu.reporting.folder import RunFolder
from tofu.rng import derive_generator
from tofu.rounds.record import round_label
from tofu.rounds.schedule import make_schedule
from tofu.secagg.encoding import SecureMean
from tofu.settings import MIN_SECURE, Settings
from tofu.tasks import TaskStream, round_context
from tofu.weights import Weights, dot, weights_of
from tofu.wire import CLIENT_ACCURACY
from tofu.workload import Workload, label_names, labeled_images, workload_of


@dataclass(kw_only=True)
class RoundResult(Collected):
    """The result of one round: what was collected from all client groups; `update` is None, as each has its own.

    Attributes:
        shown: name of the client whose proxies are kept for the report.
        nodes: client name -> node, of all clients that were asked.
        failures: client name -> reason, in one line, why it could not be used.
        step_explained_variance: that of the server's compressed step to this round's weights; None for full weights.
        server_step: factor that the server's optimizer had for the mean update; None in an abandoned round.
        clip_norm: to which clients clipped their updates, with differential privacy.
    """

    round: int
    kind: str
    shown: str
    nodes: dict[str, int]
    failures: dict[str, str]
    step_explained_variance: float | None = None
    server_step: float | None = None
    clip_norm: float = 0.0

    def add(self, collected: Collected) -> None:
        """Add what was collected from one client group."""
        self.examples += collected.examples
        for name, value in collected.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.replies += collected.replies
        self.metrics |= collected.metrics
        self.proxies = self.proxies if collected.proxies is None else collected.proxies
        if collected.with_proxies is not None:
            self.with_proxies = (self.with_proxies or 0) + collected.with_proxies
        self.survivors += collected.survivors
        self.abandoned = self.abandoned or collected.abandoned
        self.late += collected.late
        if self.secure is None or collected.secure is None:
            self.secure = self.secure or collected.secure
        else:
            self.secure = _merged(self.secure, collected.secure)

    def plugin_metrics(self) -> dict[str, float]:
        """Return the plugins' metrics, averaged over clients by examples; empty in a secure round."""
        values: dict[str, list[tuple[float, int]]] = {}
        for client, reply in self.replies:
            for name, value in self.metrics.get(client.name, {}).items():
                if name == CLIENT_ACCURACY:
                    continue
                values.setdefault(name, []).append((value, reply.examples))
        return {
            name: sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
            for name, pairs in sorted(values.items())
        }

    def mean(self, name: str) -> float | None:
        """Return a field of the replies, averaged by examples; None without replies."""
        total = sum(reply.examples for _, reply in self.replies)
        if not total:
            return None
        return float(sum(getattr(reply, name) * reply.examples for _, reply in self.replies) / total)


class RoundRunner:
    """The rounds of a run and their state on the server.

    Args:
        reference: the model at its initial weights; the rounds change it in place.
        test: held-out data.
        workload: data and model of the run; by default those that the settings name.
        clients: those that have registered for the run, if it has waited for them.
        outputs: `output_sketch` of a user's model.

    Attributes:
        models: the global model of each client group; one unless a plugin has more groups.
        accuracies: after each round, starting with the one before the first.
        noise: that the server adds, with server-noise; None in other runs.
        on_spend: called with `spent`, which includes the round, before its clients are asked.
        task_accuracies, group_accuracies: the same by task and by group (empty with one group).
    """

    def __init__(
        self,
        transport: Transport,
        reference: ReferenceModel,
        test: Sized,
        settings: Settings,
        ledger: Ledger,
        observer: Observer,
        workload: Workload | None = None,
        clients: Clients | None = None,
        outputs: bytes = b"",
        *,
        one_machine: bool = False,
    ) -> None:
        self.settings, self.plugins = settings, plugins_of(settings)
        self._shape, self._test, self._ledger, self._observer = reference.shape, test, ledger, observer
        self._stragglers = Stragglers(settings.server, one_machine=one_machine)
        self._schedule = make_schedule(settings.rounds, settings.training.rounds)
        self.stream = TaskStream.of(settings.plugins, reference.shape.classes, settings.run.seed)
        workload = workload or workload_of(settings)
        self.clients = clients or Clients(
            transport, ledger, observer, label_names(workload), known_identities(settings.secure),
            expected=settings.data.clients,
        )  # fmt: skip
        self._evaluator = Evaluator(
            test, self.stream, self.plugins, workload,
            multi_head=settings.plugins.task_heads == "multi", device=settings.run.device,
        )  # fmt: skip
        self._exchange = TrainExchange(
            transport, ledger, observer, settings.server.round_timeout,
            ask_again=not settings.privacy.noise_multiplier, outputs=outputs,
            tell_classes=self.clients.tell_classes,
        )  # fmt: skip
        self.open = OpenCollector(self._exchange, self.plugins, settings.server, observer)
        self._secure: Collector = self.open
        if "secure" in self._schedule.kinds:
            self._secure = SecureCollector(transport, self._exchange, ledger, observer, settings, self.plugins)
        call = workload.call(reference.model, reference.shape)
        self.models = [GlobalModel(reference.model, reference.shape, settings, self.plugins, call=call)]
        for group in range(1, self.plugins.groups):
            built = run_model(settings, reference.shape)
            self.models.append(GlobalModel(built.eval(), reference.shape, settings, self.plugins, group))
        self.account = Accountant(settings.privacy.privacy_delta) if settings.privacy.noise_multiplier else None
        self.noise = self.open.noise = None
        if settings.privacy.server_noise != "none":
            self.noise = self.open.noise = ServerNoise(settings.privacy, reference.param_spec)
        self.on_spend: Callable[[Mapping[str, object]], None] = lambda spent: None
        self.accuracies: list[float] = []
        self.by_class = ClassCounts()
        self.task_accuracies: list[list[float]] = []
        self.group_accuracies: list[list[float]] = []
        self.round = 0

    @property
    def introduced(self) -> tuple[Client, ...]:
        """The clients that have taken part so far, as they introduced themselves."""
        return self.clients.introduced

    @property
    def unreadable(self) -> int:
        """Number of images that clients and server left out because they cannot be read."""
        return self.clients.unreadable + len(getattr(self._test, "unreadable", ()))

    @property
    def growth(self) -> float:
        """The norm of the trainable parameters as a multiple of that at the start; NaN if a weight is not finite."""
        now, start = 0.0, 0.0
        for model in self.models:
            weights, initial = weights_of(model.averaged), model.reference.initial
            if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
                return math.nan
            now += sum(float((weights[name].double() ** 2).sum()) for name in initial)
            start += dot(initial, initial)
        return math.sqrt(now / start) if start else 1.0

    def evaluate(self) -> Evaluation:
        """Evaluate the models that the run would end with, and append the accuracies.

        In a run of tasks the result is the mean over tasks, and that of several groups is their ensemble's.
        """
        classes = self.models[0].classes
        averaged = [model.averaged for model in self.models]
        score, by_task, by_group = self._evaluator.evaluate(averaged, classes)
        self.by_class = score.by_class
        self.accuracies.append(score.accuracy)
        self.task_accuracies.append(by_task)
        self.group_accuracies.append(by_group)
        return score

    def kind(self, round_: int) -> str:
        """Return the kind of a round by the schedule."""
        return self._schedule.kind(round_, self.accuracies)

    def run_round(self, round_: int) -> RoundResult:
        """Run one round, counted from 1.

        Raises:
            RunError: too few clients are connected, or no reply is valid.
        """
        settings, self.round = self.settings, round_
        connected = self.clients.connected(
            min_clients=settings.server.min_clients, timeout=settings.server.round_timeout, round_=round_
        )
        kind = self.kind(round_)
        needed = max(settings.server.min_clients, MIN_SECURE if kind == "secure" else 1)
        connected = self._stragglers.active(connected, round_, min_clients=needed)
        sampled = self._sample(connected, round_, secure=kind == "secure")
        asked = [client for clients in sampled for client in clients]
        state = self._state(round_, kind, shown=asked[0].name)
        result = RoundResult(
            round=round_, kind=kind, shown=state.shown, nodes={client.name: client.node for client in asked},
            failures=state.failures, clip_norm=state.clip_norm,
        )  # fmt: skip
        for model in self.models:  # also of groups without a client in this round: steps are counted by rounds
            model.downlink.begin(round_, whole=kind == "fedavg")
        result.step_explained_variance = self.models[0].downlink.explained_variance
        self._spend(kind, connected, sampled)
        try:
            for model, clients in zip(self.models, sampled, strict=True):
                if clients:
                    self._collect(model, clients, state, result)
        finally:
            for name, reason in state.failures.items():
                self._observer.on_client_failure(round_, name, result.nodes[name], reason)
        self._note_stragglers(state, set(result.nodes))
        for node, (name, reason) in self.clients.take_declined().items():
            key = name if name and name not in result.nodes else str(node)
            result.nodes[key], result.failures[key] = node, reason
        if result.sums:
            self.plugins.reduce(result.sums, result.examples)
        for model in self.models:
            context = round_context(settings, self._shape, round_, group=model.group)
            self.plugins.on_aggregate(model.reference.model, context)
            model.average(round_)
        for model in self.models:
            before = model.reference.param_spec.parameter_count
            if model.prepare(round_ + 1):
                after = model.reference.param_spec.parameter_count
                self._observer.on_note(f"round {round_}: plugins change the model from {before} to {after} parameters")
        return result

    def _spend(self, kind: str, connected: list[Client], sampled: list[list[Client]]) -> None:
        """Account for a round before its clients are asked: what they send is spent, even if this process dies."""
        if self.account is None:
            return
        privacy = self.settings.privacy
        available = [len(self._members(connected, group)) for group in range(len(self.models))]
        drawn = largest_fraction([len(clients) for clients in sampled], available) if privacy.secret_sampling else ()
        if self.noise is None or self.noise.participation.may_return:
            self.account.spend(privacy.noise_multiplier, kind, *drawn)
        if self.noise is not None:
            self.noise.participation.begin(client.name for clients in sampled for client in clients)
        self.on_spend(self.spent)

    @property
    def spent(self) -> dict[str, object]:
        """The privacy account as plain JSON values; empty without differential privacy."""
        account = self.account.to_dict() if self.account is not None else {}
        return account | ({} if self.noise is None else {"participation": self.noise.participation.to_dict()})

    def restore_spent(self, spent: object) -> None:
        """Restore what `spent` was. Raises RunError if it is malformed."""
        self.account = Accountant.from_dict(spent)
        if self.noise is not None:
            kept = spent.get("participation") if isinstance(spent, dict) else None
            self.noise.participation = Participation.from_dict(self.noise.participation.separation, kept)

    @property
    def epsilons(self) -> tuple[float | None, float | None]:
        """Epsilon so far against the server, and against those who see the models if that differs, else None."""
        if self.account is None:
            return None, None
        if self.noise is not None:
            return math.inf, self.account.epsilon
        return self.account.epsilon, self.account.model_epsilon if self.settings.privacy.secret_sampling else None

    def _state(self, round_: int, kind: str, shown: str) -> RoundState:
        now = time.monotonic()
        return RoundState(
            round_,
            kind,
            now + self.settings.server.round_timeout,
            self.plugins.broadcast_bytes(max_bytes=MAX_STATE_BYTES) if self.plugins else b"",
            self._schedule.secure_may_follow(round_, self.accuracies),
            shown,
            over_sampling=self.settings.server.over_sampling,
            label=round_label(kind, self.settings.codec.compressor),
            clip_norm=clip_norm(self.settings, self.plugins),
            began=now,
            soft_deadline=now + self._stragglers.patience(kind),
        )

    def _note_stragglers(self, state: RoundState, asked: set[str]) -> None:
        """Record which clients did not reply, and report those that are now suspended."""
        seconds = state.last_reply - state.began
        for note in self._stragglers.finished(
            state.kind, state.round, asked=asked, silent=state.silent, seconds=seconds
        ):
            self._observer.on_note(f"round {state.round}: {note}", round=state.round)

    def _collect(self, model: GlobalModel, clients: list[Client], state: RoundState, result: RoundResult) -> None:
        """Collect the updates of one group's clients and step its model."""
        collector = self._secure if state.kind == "secure" else self.open
        collected = collector.collect(model, clients, state)
        result.add(collected)
        if collected.update is not None:
            factor = model.automatic_step(state.round, state.kind, collected.diversity)
            result.server_step = factor * (self.settings.server.server_lr or 1.0)
            model.step(collected.update, factor)

    def _members(self, clients: list[Client], group: int) -> list[Client]:
        return [client for client in clients if len(self.models) == 1 or self.plugins.group_of(client.name) == group]

    def _sample(self, clients: list[Client], round_: int, *, secure: bool) -> list[list[Client]]:
        """Return the clients of each group that are asked in this round:
        a function of seed, round and connected clients.

        With secret-sampling they are not, because all participants know the seed.
        """
        settings, groups = self.settings, len(self.models)
        minimum = max(settings.server.min_clients // groups, MIN_SECURE if secure else 1)
        sampled = []
        for group in range(groups):
            own = self._members(clients, group)
            count = max(minimum, round(settings.server.client_fraction * len(own)))
            count = math.ceil(count * settings.server.over_sampling - 1e-9)
            if self.noise is not None:
                own = self.noise.eligible(own, minimum)
            if count < len(own) and settings.privacy.secret_sampling:
                own = [own[row] for row in sorted(SystemRandom().sample(range(len(own)), count))]
            elif count < len(own):
                place = (group,) if groups > 1 else ()
                generator = derive_generator(settings.run.seed, round_, "sample", *place)
                rows = torch.randperm(len(own), generator=generator)[:count].sort().values
                own = [own[int(row)] for row in rows]
            sampled.append(own)
        return sampled

    def save(self, snapshot: Snapshot) -> None:
        """Add everything that the next rounds need to a checkpoint."""
        snapshot.blobs["plugins"] = self.plugins.broadcast_bytes(max_bytes=MAX_STATE_BYTES)
        for model in self.models:
            part = Snapshot()
            model.save(part)
            snapshot.put_part(f"group {model.group}", part)
        self._exchange.save(snapshot)
        snapshot.plain |= {
            "round": self.round, "accuracies": self.accuracies, "task_accuracies": self.task_accuracies,
            "group_accuracies": self.group_accuracies, "clients": self.clients.state(),
            "ledger": self._ledger.totals(), "privacy": self.spent,
        }  # fmt: skip

    def restore(self, snapshot: Snapshot, *, clients_kept: bool) -> None:
        """Restore what `save` wrote.

        Args:
            clients_kept: the clients still have the state that they had then, as those of one process do.
        """
        plain, self.round = snapshot.plain, int(snapshot.plain["round"])
        if self.account is not None:
            self.restore_spent(plain["privacy"])
        self.plugins.load(broadcast=snapshot.blobs["plugins"], max_bytes=MAX_STATE_BYTES)
        for model in self.models:
            part = snapshot.part(f"group {model.group}")
            model.restore(part, round_=self.round, clients_kept=clients_kept)
        self.accuracies[:], self.task_accuracies[:] = plain["accuracies"], plain["task_accuracies"]
        self.group_accuracies[:] = plain["group_accuracies"]
        self._ledger.restore(plain["ledger"])
        if clients_kept:
            self._exchange.restore(snapshot)
            self.clients.restore(plain["clients"])

    def write_model(self, folder: RunFolder) -> None:
        """Write the models that the run would end with."""
        state = b""
        if self.plugins:
            averaged = self.models[0].averaged
            state = self.plugins.calibrated_bytes(averaged, labeled_images(self._test), max_bytes=MAX_STATE_BYTES)
        folder.write_model(weights_of(self.models[0].averaged), self._shape, state)
        for model in self.models[1:]:
            folder.write_model(weights_of(model.averaged), self._shape, b"", group=model.group)

    @property
    def weights(self) -> Weights:
        """A copy of the weights that the run would end with; names of further groups start with "group N/"."""
        weights = weights_of(self.models[0].averaged)
        for model in self.models[1:]:
            weights |= {f"group {model.group}/{name}": value for name, value in weights_of(model.averaged).items()}
        return weights


def _merged(first: SecureMean, second: SecureMean) -> SecureMean:
    """Return the totals of two groups' secure sums; update and ranges are those of the first."""
    examples = first.examples + second.examples
    return dataclasses.replace(
        first,
        examples=examples,
        loss=(first.loss * first.examples + second.loss * second.examples) / examples,
        clipped=first.clipped + second.clipped,
        largest_clipped=max(first.largest_clipped, second.largest_clipped),
    )


def largest_fraction(sampled: Sequence[int], available: Sequence[int]) -> tuple[int, int]:
    """(sampled, available) of the group with the largest sampling fraction, whose clients have the least privacy.

    Args:
        sampled: number of clients drawn from each group, at least one in all groups together.
        available: number of clients of each group.
    """
    drawn = [(count, of) for count, of in zip(sampled, available, strict=True) if count]
    return max(drawn, key=lambda pair: pair[0] / pair[1])
