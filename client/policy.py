"""A client's data, and whether they fit the run's model."""

from collections.abc import Sized
from dataclasses import replace

from flwr.app import Context

from client.state import load_class_names
from tofu.data import ImageShape, LabeledImages, LabeledRows, RowFormat, local_folder, local_rows
from tofu.errors import DataError
from tofu.row_workload import workload_of
from tofu.settings import Settings
from tofu.workload import Workload


def client_data(settings: Settings, context: Context, workload: Workload | None = None) -> Sized:
    """The client's data: the folder that its node config names as `data`, with the classes that the settings or the
    server number; or its partition of the workload's data, by default the dataset that the settings name.

    Raises:
        DataError: the node config has neither.
    """
    folder, data = context.node_config.get("data"), settings.data
    if folder is None:
        names: tuple[str, ...] = ()
    elif data.class_names:
        names = tuple(filter(None, (name.strip() for name in data.class_names.split(","))))
    else:
        names = load_class_names(context)
    if folder is not None and data.kind != "images":
        return local_rows(str(folder), replace(RowFormat.of(data), class_names=names))
    if folder is not None:
        return local_folder(
            str(folder), class_names=names, subpopulations=data.subpopulations, label_column=data.label_column,
            image_column=data.image_column, strict=data.strict,
        )  # fmt: skip
    partition = context.node_config.get("partition-id")
    if partition is None:
        raise DataError("node config has neither data (a folder of images) nor partition-id (a part of the dataset)")
    return (workload or workload_of(settings)).client(int(partition))


def check_fit(data: LabeledImages | LabeledRows, shape: ImageShape) -> None:
    """Check that inputs and labels fit the input and output of the run's model.

    Raises:
        DataError: they do not.
    """
    if isinstance(data, LabeledRows):
        if data.width != shape.width:
            raise DataError(f"rows of {data.width} features or tokens, the run's network takes {shape.width}")
    else:
        own = data.shape
        if (own.channels, own.height, own.width) != (shape.channels, shape.height, shape.width):
            raise DataError(
                f"images of {own.channels}x{own.height}x{own.width}, the run's network takes "
                f"{shape.channels}x{shape.height}x{shape.width}"
            )
    if len(data) and int(data.labels.max()) >= shape.classes:
        raise DataError(f"label {int(data.labels.max())}, the run's network has classes 0 to {shape.classes - 1}")
