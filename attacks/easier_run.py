"""The command of a run like a given one whose messages are easier to invert, for the report of an attack."""

import os
import shlex
from pathlib import Path

from tofu.imports import MODULES, user_modules
from tofu.settings import FIELDS, Settings, dashed, separator_of, settings_of_section

FEW_IMAGES, FEW_IN_BATCH = 40, 4
"""Images of all clients, and of a batch, in the command."""

_OTHER_SECTIONS = ("Links", "Run", "Secure rounds", "Server")
"""Sections of settings that say how and where a run is made, and nothing about an open round's messages."""

_LEFT_OUT = frozenset((
    "rounds", "train_images", "local_epochs", "partition", "client_column", "batch_size", "client_fraction",
    "over_sampling", "schedule", "switch_round", "recovery", "plateau_patience", "plateau_gain", "tasks", "task_count",
    "task_order", "task_heads", "min_clients", "test_images",
))  # fmt: skip
"""Settings that the command gives itself, or that would not fit two rounds with all clients."""


def easier_run(settings: Settings, kind: str, run: Path) -> str:
    """Return the command of two rounds with few images in few local steps, and of the attack on them.

    It has every other setting that makes the messages what they are, and works in any folder. It is "" for a run that
    has as few images and steps already.

    Args:
        settings: of the run that was attacked, with absolute paths.
        kind: of the round that was attacked, one of `tofu.rounds.KINDS`.
        run: its folder.
    """
    skipped = {name for section in _OTHER_SECTIONS for name in settings_of_section(section)} | _LEFT_OUT
    skipped -= {"seed"}
    config, defaults = settings.to_config(), Settings().to_config()
    options = [
        part
        for name in FIELDS
        if name not in skipped and config[dashed(name)] != defaults[dashed(name)]
        for part in _option(name, config[dashed(name)])
    ]
    images, training = max(FEW_IMAGES, FEW_IN_BATCH * settings.data.clients), settings.training
    own = settings.data.train_images
    if 0 < own <= images and training.batch_size <= FEW_IN_BATCH and training.local_epochs == 1:
        return ""
    few = f"--rounds 2 --train-images {images} --local-epochs 1 --partition iid --batch-size {FEW_IN_BATCH}".split()
    few += ["--record-clients", "0"]
    folder = f"{run}-few"
    words = ["tofu", "run", *options, *(["--schedule", "fedavg"] if kind == "fedavg" else []), *few]
    modules = set(user_modules(config.values()).values()) - {os.getcwd()}
    where = "".join(f"{MODULES}={shlex.quote(path)} " for path in sorted(modules)[:1])
    first, second = shlex.join([*words, "--run-folder", folder]), shlex.join(["tofu", "attack", folder])
    return f"{where}{first} && {where}{second}"


def _option(name: str, value: object) -> list[str]:
    flag = dashed(name)
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if separator := separator_of(name):
        return [f"--{flag}={part}" for part in str(value).split(separator)]
    return [f"--{flag}={value}"]
