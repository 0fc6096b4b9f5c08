"""Attacks on recorded messages of a run, scored against the client's own images.

A recorded update includes error feedback and results from many local steps on many images. Attacks simulate the client
with fewer images and steps (`attacks.simulation`), and reconstructions are compared with all of the client's images.
Momentum, weight decay and the run's plugins are not simulated.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import torch

from attacks.app_recorded import AppMessage
from attacks.base import Attack, AttackError, Watch, make_attack
from attacks.easier_run import easier_run
from attacks.evaluate import (
    CONTROL,
    INTERRUPTED,
    TIME_LIMIT,
    Row,
    format_outcome,
    load_row,
    made_folder,
    recorded_scenario,
    row_of,
    save_row,
    unstarted_row,
    write_document,
)
from attacks.messages import local_round
from attacks.metrics import lpips_network
from attacks.networks import attacked_model
from attacks.observation import Observation
from attacks.trials import AttackResult
from tofu.compression import uplink_compressor
from tofu.data import FederatedData, LabeledImages
from tofu.errors import SettingError
from tofu.formatting import format_count
from tofu.recording import AppRecording, Recording, read_recording, recordings, round_of
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_generator
from tofu.training import LocalTrainingConfig
from tofu.weights import load_weights
from tofu.wire import HEADER_BYTES, read_payload

ATTACKS = ("analytic", "simulation", "codec-aware", "proxy-images", "label-counts")
"""Attacks that are run by default."""

ROUNDS = 3
"""Number of recorded rounds that are attacked by default."""

MANY_STEPS = 10
"""Local steps in a message from which a note says, before the attacks, that they seldom invert so many."""


def attacked_rounds(run: Path, count: int) -> list[int]:
    """Return `count` of the recorded rounds at equal distances, the first and the last among them; all, if fewer.

    Raises:
        RunError: the run has no recordings.
    """
    found = sorted({round_of(path) for path in recordings(run)})
    if count >= len(found):
        return found
    return [found[index * (len(found) - 1) // max(count - 1, 1)] for index in range(count)]


def _many_steps(steps: int, easier: str) -> str:
    """Return the note on a message of many local steps, with the command of `easier_run` if there is one."""
    instead = f"; a run that is easier to attack: {easier}" if easier else ""
    return f"note: a message is the sum of {format_count(steps, 'local step')}, which attacks seldom invert{instead}"


def observation_of(recording: Recording) -> Observation:
    """Return the attacker's observation of a recorded message.

    Raises:
        AttackError: the base weights are not those of the run's model.
        PayloadError: the payload was not made for this model and these settings.
        SettingError: the model cannot be built.
    """
    settings, network = recording.settings, _network(recording)
    compressor = uplink_compressor(settings, recording.kind, network)
    payload = read_payload(
        recording.payload,
        codec=compressor.code,
        round_=recording.round,
        fingerprint=None,
        max_bytes=len(recording.payload),
    )
    content = compressor.describe(payload.body)
    name = f"{compressor.name}:{settings.codec.codec_mode}" if content else compressor.name
    if content and content.proxies is None:
        name = "correction"  # what a client sends in place of proxies where that explains enough
    return Observation(
        message=f"recorded {name}",
        network=network,
        update=compressor.decompress(network, payload.body),
        images=recording.examples,
        batch_size=settings.training.batch_size,
        epochs=settings.training.local_epochs,
        lr=recording.lr,
        proxies=content.proxies if content else None,
        proxy_settings=content.settings if content else None,
        payload_bytes=len(recording.payload),
    )


def control_of(recording: Recording, data: LabeledImages, observation: Observation) -> Observation:
    """Return the exact update of the same round, from a repetition of the client's training:
    the control of the attacks.
    """
    settings = recording.settings
    config = LocalTrainingConfig.of(settings.training, recording.round)
    generator = derive_generator(settings.run.seed, recording.round, recording.client, "train")
    exact = local_round(observation.network, data, config, generator).update
    return replace(observation, message=CONTROL, update=exact, proxies=None, proxy_settings=None,
                   payload_bytes=HEADER_BYTES + observation.network.param_spec.float32_bytes)  # fmt: skip


def attack_run(
    run: Path,
    folder: Path,
    *,
    attacks: tuple[str, ...] = ATTACKS,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
    time_limit: float = math.inf,
    model: str | None = None,
    dataset: str | None = None,
    log: Callable[[str], None],
) -> list[Row]:
    """Attack the recorded messages of some rounds of a run, and as a control the exact update of each.

    Messages of a Flower app (`tofu.record`) have no control, because its training cannot be repeated. Attacks on a
    later message of a client also receive the earlier ones. Only trials that a shorter limit stopped are repeated.

    Args:
        folder: for the results.
        rounds: number of rounds, at equal distances.
        seconds: time limit of one attack.
        time_limit: seconds after which no further attack starts; their rows say so (`not_started`).
        model, dataset: those of a Flower app (`attacks.app_recorded`); of our own runs the recording knows them.

    Raises:
        RunError: nothing was recorded, or a recording is damaged.
        DataError: the run's images cannot be read.
        SettingError: no such attack, or a client that is no partition of the run's dataset.
    """
    chosen, limit, rows, told = [make_attack(name) for name in attacks], Watch(time_limit), list[Row](), set[str]()
    among, perceptual, trials = set(attacked_rounds(run, rounds)), lpips_network(), made_folder(folder / "trials")
    waiting, begun, before = [path for path in recordings(run) if round_of(path) in among], list[Row](), 0
    try:
        for recorded, recording, message, sent in _messages(run, among, model, dataset):
            if not rows and sent.steps > MANY_STEPS:
                log(_many_steps(sent.steps, str(message.next_step(run).get("easier_run", ""))))
            trial_pairs = list(product((*message.controls(sent), sent), chosen))
            begun = [_unstarted(message, *pair, INTERRUPTED, run) for pair in trial_pairs]
            waiting, before = waiting[1:], len(rows)
            for observation, attack in trial_pairs:
                name = f"{recorded.name}-{observation.message.replace(' ', '-').replace(':', '-')}-{attack.name}"
                row = load_row(path := trials / f"{name}.json", seconds)
                if row is None and not attack.incompatibility(observation) and not limit.go_on():
                    row = load_row(path, 0.0) or _unstarted(message, observation, attack, TIME_LIMIT, run)
                if row is None:
                    generator = derive_generator(message.seed, name)
                    result = _attacked(attack, observation, generator, Watch(seconds), message, perceptual)
                    row = row_of(message.scenario(observation), observation.message, attack.name, result)
                    save_row(path, row, result)
                    if row["refused"] not in told:  # it is not possible in any round
                        log(f"round {recording.round} client {recording.client} {format_outcome(row)}")
                    told |= {row["refused"]} - {""}
                rows.append(row | _images_of(path, folder) | message.next_step(run))
    except KeyboardInterrupt:
        rows += begun[len(rows) - before :]
        rows += [row | {"pretrain_rounds": round_of(path) - 1} for path in waiting for row in begun]
        write_document(folder, {"run": str(run), "attacks": list(attacks)}, rows, planned=len(rows))
        raise
    write_document(folder, {"run": str(run), "attacks": list(attacks)}, rows, planned=len(rows))
    return rows


def _unstarted(
    message: "RunMessage | AppMessage", observation: Observation, attack: Attack, reason: str, run: Path
) -> Row:
    row = unstarted_row(message.scenario(observation), observation.message, attack.name, reason)
    return row | message.next_step(run)


def _messages(
    run: Path, rounds: Collection[int], model: str | None, dataset: str | None
) -> Iterator[tuple[Path, Recording | AppRecording, "RunMessage | AppMessage", Observation]]:
    """Yield the messages of these rounds: file, recording, message, and what is observed of it and of earlier ones."""
    earlier: dict[str, tuple[Observation, ...]] = {}
    for recorded in recordings(run):
        recording = read_recording(recorded)
        message = _message_of(recording, model, dataset)
        sent = replace(message.observation, earlier=earlier.get(recording.client, ()))
        earlier[recording.client] = (*sent.earlier, replace(sent, earlier=()))
        if recording.round in rounds:
            yield recorded, recording, message, sent


@dataclass(frozen=True)
class RunMessage:
    """A recorded message of one of our own runs."""

    recording: Recording

    @cached_property
    def observation(self) -> Observation:
        """The attacker's observation."""
        return observation_of(self.recording)

    def controls(self, sent: Observation) -> tuple[Observation, ...]:
        """Return the exact update that the message encodes."""
        return (control_of(self.recording, self.truth, sent),)

    @property
    def truth(self) -> LabeledImages:
        """The client's images."""
        return self._data[1]

    @property
    def others(self) -> LabeledImages:
        """Images that the update was not computed from."""
        return self._data[0].test()

    @property
    def seed(self) -> int:
        return int(self.recording.settings.run.seed)

    def scenario(self, observation: Observation) -> dict[str, object]:
        """Return the fields of a row of results."""
        seen, settings = self.recording, self.recording.settings
        return recorded_scenario(
            observation, dataset=settings.data.dataset, model=settings.model.model, norm=settings.model.norm,
            seed=settings.run.seed, client=seen.client, round_=seen.round,
        )  # fmt: skip

    def next_step(self, run: Path) -> dict[str, object]:
        """Return the field of a row with the command of a run that is easier to attack."""
        return {"easier_run": easier_run(self.recording.settings, self.recording.kind, run)}

    @cached_property
    def _data(self) -> tuple[FederatedData, LabeledImages]:
        return _data(self.recording)


def _images_of(trial: Path, folder: Path) -> dict[str, object]:
    return {"images": str(trial.with_suffix(".npz").relative_to(folder))}


def _message_of(recording: Recording | AppRecording, model: str | None, dataset: str | None) -> RunMessage | AppMessage:
    if isinstance(recording, AppRecording):
        return AppMessage(recording, model, dataset)
    return RunMessage(recording)


def _attacked(attack: Attack, observation: Observation, generator: torch.Generator, watch: Watch,
              message: RunMessage | AppMessage, perceptual: torch.nn.Module | None) -> AttackResult:  # fmt: skip
    refused = attack.incompatibility(observation)
    if refused:
        return AttackResult.refuse(refused, observation)
    found = attack.run(observation, generator=generator, watch=watch)
    return AttackResult.of(found, observation, message.truth, message.others, perceptual, watch)


def _network(recording: Recording) -> ReferenceModel:
    settings = recording.settings
    model = attacked_model(settings.model.model, recording.shape, norm=settings.model.norm, seed=settings.run.seed)
    network = ReferenceModel(model.eval(), recording.shape).as_built()
    if {name: value.shape for name, value in recording.base.items()} != network.param_spec.shapes:
        name = settings.model.model
        raise AttackError(f"the recorded weights of round {recording.round} are not those of model={name!r}")
    load_weights(model, recording.base)
    return network


def _data(recording: Recording) -> tuple[FederatedData, LabeledImages]:
    """Return the run's images, and those of the recorded client."""
    data = FederatedData.of(recording.settings.data, recording.settings.run.seed)
    if data.shape != recording.shape:
        raise AttackError(f"the run's images are {data.shape}, the recorded network takes {recording.shape}")
    if not recording.client.isdigit():
        raise SettingError("client", recording.client, "the number of a simulated client, whose images are known")
    return data, data.client(int(recording.client))
