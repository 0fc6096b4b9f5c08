"""The command that an attack's report suggests."""

from pathlib import Path

from attacks.easier_run import FEW_IMAGES, easier_run
from tofu.settings import Settings


def test_it_has_few_images_in_few_steps_and_all_else_as_in_the_run() -> None:
    settings = Settings.of({"clients": 4, "local_epochs": 5, "lr": 0.05, "ratio": 20.0})
    command = easier_run(settings, "compressed", Path("mine"))
    for words in ("--lr=0.05", "--ratio=20.0", f"--train-images {FEW_IMAGES}", "--local-epochs 1", "--batch-size 4"):
        assert words in command
    assert command.endswith("--run-folder mine-few && tofu attack mine-few")


def test_there_is_none_for_a_run_that_has_as_few() -> None:
    few = {"clients": 4, "train_images": FEW_IMAGES, "local_epochs": 1, "batch_size": 4}
    assert easier_run(Settings.of(few), "compressed", Path("mine-few")) == ""
    for more in ({"train_images": 0}, {"train_images": 41}, {"local_epochs": 2}, {"batch_size": 5}):
        assert easier_run(Settings.of(few | more), "compressed", Path("mine-few"))
