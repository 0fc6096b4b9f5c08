"""Refusals that need neither data nor a model, before they are read and before Flower starts.

A run checks the same later: these checks only decide how soon its user is told.
"""

from pathlib import Path

from tofu.errors import SettingError
from tofu.reporting.run_settings import check_new, check_resumed, lock_run
from tofu.rounds.schedule import make_schedule
from tofu.settings import Settings
from tofu.settings.datasets import check_dataset


def check_early(settings: Settings, *, starts: bool = True) -> None:
    """Check folders and names first, and then what needs torch: the device, secure rounds and a user's model.

    Args:
        starts: a run of these settings starts, or goes on, in its run folder.

    Raises:
        SettingError: a setting cannot be used.
    """
    if starts and settings.run.resume:
        lock_run(Path(settings.run.resume)).release()
        check_resumed(settings)
    elif starts and settings.run.run_folder:
        check_new(Path(settings.run.run_folder))
    check_dataset(settings.data)
    settings.check_recorded()
    weights = settings.model.initial_weights
    if weights and not Path(weights).exists():
        accepted = "a .safetensors file, a file of torch.save with a state dict, or the folder of a run"
        raise SettingError("initial_weights", weights, f"{accepted} (No such file or directory)")
    if settings.run.device not in ("cpu", "auto"):
        from tofu.device import open_device

        open_device(settings.run.device)
    if ":" in settings.model.model:
        from tofu.models import check_factory

        check_factory(settings.model.model, settings.data.kind)
    if "secure" in make_schedule(settings.rounds, settings.training.rounds).kinds:
        from server.secure_ranges import check_secure_settings

        check_secure_settings(settings)
