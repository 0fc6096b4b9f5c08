"""Names of datasets, which can be checked before torch is imported and before any data are read."""

import re
from pathlib import Path

from tofu.errors import SettingError, first_line
from tofu.settings.groups import EMBEDDED_TABLES, DataSettings

ACCEPTED_DATASETS = (
    "'digits', a Hugging Face hub id such as 'ylecun/mnist', or an existing folder of parquet files or images"
)
ACCEPTED_TABLES = f"{' or '.join(EMBEDDED_TABLES)}, a CSV or parquet file, a folder of them, or a Hugging Face hub id"
TABLE_SUFFIXES = (".csv", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_images(dataset: str) -> str:
    """Return "digits", the absolute path of a folder, or a hub id. Raises SettingError for everything else."""
    if dataset == "digits":
        return dataset
    try:
        folder = Path(dataset).expanduser()
        if dataset and folder.is_dir():
            return str(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise SettingError("dataset", dataset, f"{ACCEPTED_DATASETS} ({first_line(error)})") from error
    if not _HUB_ID.fullmatch(dataset):
        raise SettingError("dataset", dataset, ACCEPTED_DATASETS)
    return dataset


def check_hub_table(dataset: str) -> None:
    """Raise SettingError unless the name of a table that is no file and no folder is a hub id."""
    if not _HUB_ID.fullmatch(dataset):
        raise SettingError("dataset", dataset, ACCEPTED_TABLES)


def check_dataset(data: DataSettings) -> None:
    """Raise SettingError for a dataset that is neither built in, nor on this machine, nor named as on the hub."""
    if data.kind == "images":
        resolve_images(data.dataset)
    elif data.dataset not in EMBEDDED_TABLES:
        path = Path(data.dataset)
        if not (path.is_dir() or (path.is_file() and path.suffix.lower() in TABLE_SUFFIXES)):
            check_hub_table(data.dataset)
