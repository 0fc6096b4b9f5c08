"""Splits of a dataset on the Hugging Face hub."""

import errno
from pathlib import Path
from typing import Any

from tofu.data.splits import Split, split_role
from tofu.data.tables import Columns, ImageTable, table_splits
from tofu.errors import DataError, first_line

_TIMEOUT = 10.0  # seconds


def hub_splits(dataset: str, columns: Columns, class_names: tuple[str, ...]) -> dict[str, Split]:
    """Return the splits of a hub dataset of images. Raises DataError as `hub_tables`, or if it has no images."""
    tables = {
        role: ImageTable(
            rows.features.arrow_schema,
            rows.data.table.select,
            f"{dataset} ({role})",
            f"{dataset} ({role}), row {{}}".format,
            Path(),
        )
        for role, rows in hub_tables(dataset).items()
    }
    return table_splits(tables, columns, class_names) if tables else {}


def hub_tables(dataset: str) -> dict[str, Any]:
    """Return the `datasets.Dataset` of each split, from the Hugging Face cache, or downloaded into the cache first.

    Args:
        dataset: hub id.

    Raises:
        DataError: the dataset does not exist, the hub cannot be reached, or the dataset cannot be read.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        try:
            found = Cache(dataset_name=dataset.split("/")[1], repo_id=dataset, version="auto", hash="auto").as_dataset()
        except (ValueError, FileNotFoundError):  # It is not in the cache, or another process is writing it.
            # One request with a short timeout: load_dataset alone tries an unreachable network for half a minute.
            HfApi().dataset_info(dataset, timeout=_TIMEOUT)
            found = datasets.load_dataset(dataset)
    except Exception as error:
        # httpx, huggingface_hub, datasets and the file system raise many types, which all mean the same to a user.
        reason = first_line(error)
        if isinstance(error, RepositoryNotFoundError):
            reason = "no dataset has that name, or it is private"
        elif isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES):
            reason += "; HF_HOME can name a writable folder"
        raise DataError(
            f"dataset {dataset!r} cannot be loaded from the hub ({reason}): "
            "expected 'digits', a hub id such as 'ylecun/mnist', or an existing folder"
        ) from error
    return {role: rows for name, rows in found.items() if (role := split_role(str(name)))}
