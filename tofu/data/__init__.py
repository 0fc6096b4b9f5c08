"""The data of a run: images, tables or texts.

`open_data` partitions a dataset over simulated clients by the partitioners of flwr-datasets; `local_folder` reads a
real client's own images. Parquet is read by pyarrow and images are decoded in memory: nothing is written to a cache,
and only a hub id uses the network. Labels are read at once, images when they are needed.
"""

from tofu.data.federated import (
    FederatedData,
    local_folder,
    normalization_of,
    open_data,
)
from tofu.data.images import ImageShape, LabeledImages, to_float
from tofu.data.partition import PARTITIONS, partition_by_id, partition_rows
from tofu.data.rows import FederatedRows, LabeledRows, local_rows, open_rows
from tofu.settings.datasets import ACCEPTED_DATASETS

__all__ = [
    "ACCEPTED_DATASETS",
    "PARTITIONS",
    "FederatedData",
    "FederatedRows",
    "ImageShape",
    "LabeledImages",
    "LabeledRows",
    "local_folder",
    "local_rows",
    "normalization_of",
    "open_data",
    "open_rows",
    "partition_by_id",
    "partition_rows",
    "to_float",
]
