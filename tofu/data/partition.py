"""Partition the rows of a dataset over simulated clients."""

import math

import numpy as np
from numpy.typing import NDArray

from tofu.errors import SettingError
from tofu.settings.groups import DataSettings

IntArray = NDArray[np.int64]

PARTITIONS = ("iid", "dirichlet", "shards")

_MIN_IMAGES = 10


def partition_clients(
    data: DataSettings, labels: IntArray, ids: NDArray[np.str_] | None, seed: int
) -> tuple[tuple[IntArray, ...], tuple[str, ...]]:
    """Partition rows over the clients of a run -> (rows of each client, names of the clients).

    Args:
        labels: int64 [n]. Without rows, as on a server whose clients have their own data, all parts are empty.
        ids: name of each row's client [n], or None if the dataset has no such column.

    Raises:
        SettingError: there are fewer rows or names than clients, or no column of names for partition=natural.
    """
    names = tuple(str(number) for number in range(data.clients))
    if data.partition == "natural":
        if ids is None:
            raise SettingError("client_column", data.client_column, "a column that names each row's client")
        return partition_by_id(ids, clients=data.clients, seed=seed)
    if not len(labels):
        return (np.arange(0),) * data.clients, names
    parts = partition_rows(
        labels, clients=data.clients, partition=data.partition, alpha=data.alpha,
        shards_per_client=data.shards_per_client, seed=seed,
    )  # fmt: skip
    return parts, names


def partition_rows(
    labels: IntArray, *, clients: int, partition: str, alpha: float, shards_per_client: int, seed: int
) -> tuple[IntArray, ...]:
    """Partition the rows 0..n-1 over clients: each row goes to exactly one client, and each part is shuffled.

    After a Dirichlet draw, clients with fewer than min(10, n / clients / 2) rows receive rows of the largest client.
    The minimum size of flwr-datasets is not used because it redraws up to ten times and then fails for many clients or
    a small alpha, and its balancing divides by zero once every client is full. Shards are cut here because its
    ShardPartitioner drops rows that do not fill a shard, and its PathologicalPartitioner drops whole classes.

    Args:
        labels: int64 [n].
        clients: number of parts.
        partition: one of `PARTITIONS`, as in `tofu.data.open_data`.
        alpha: concentration of the Dirichlet distribution.
        shards_per_client: for "shards".
        seed: seeds all draws.

    Returns:
        For each client its rows, int64 [its number of rows].

    Raises:
        SettingError: there are more clients, or more shards, than rows.
    """
    n = len(labels)
    if clients > n:
        raise SettingError("clients", clients, f"at most {n}, the number of training images")
    rng = np.random.default_rng([seed, 1])
    if partition == "shards":
        if clients * shards_per_client > n:
            accepted = f"at most {n // clients} ({n} images, {clients} clients)"
            raise SettingError("shards_per_client", shards_per_client, accepted)
        shards = np.array_split(np.argsort(labels, kind="stable"), clients * shards_per_client)
        hands = rng.permutation(len(shards)).reshape(clients, shards_per_client)
        parts = [np.concatenate([shards[shard] for shard in hand]) for hand in hands]
    elif partition == "iid":
        parts = np.array_split(rng.permutation(n), clients)
    else:
        parts = _dirichlet(labels, clients, alpha, rng)
        _fill_up(parts, math.ceil(min(_MIN_IMAGES, n / clients / 2)))
    return tuple(rng.permutation(part) for part in parts)


def partition_by_id(ids: NDArray[np.str_], *, clients: int, seed: int) -> tuple[tuple[IntArray, ...], tuple[str, ...]]:
    """Partition rows by the name of their client -> (rows of each client, names of the clients).

    Args:
        ids: name of each row's client [n].
        clients: number of clients: those with the most rows, in the order of their names.
        seed: seeds the order of each client's rows.

    Raises:
        SettingError: there are fewer names than clients.
    """
    names, counts = np.unique(ids, return_counts=True)
    if clients > len(names):
        raise SettingError("clients", clients, f"at most {len(names)}, the number of names in the client column")
    rng = np.random.default_rng([seed, 1])
    chosen = np.sort(np.argsort(-counts, kind="stable")[:clients])
    parts = tuple(rng.permutation(np.flatnonzero(ids == names[number])) for number in chosen)
    return parts, tuple(str(names[number]) for number in chosen)


def _dirichlet(labels: IntArray, clients: int, alpha: float, rng: np.random.Generator) -> list[IntArray]:
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    rows, draw = rng.permutation(len(labels)), int(rng.integers(2**31))
    partitioner = DirichletPartitioner(clients, "label", alpha, min_partition_size=0, shuffle=False, seed=draw)
    partitioner.dataset = Dataset.from_dict({"row": rows, "label": labels[rows]})
    return [np.asarray(partitioner.load_partition(i)[:]["row"], dtype=np.int64) for i in range(clients)]


def _fill_up(parts: list[IntArray], min_rows: int) -> None:
    """Move rows from the largest part, one at a time, until each part has `min_rows` (at most the mean size)."""
    sizes = np.array([len(part) for part in parts])
    for short in np.flatnonzero(sizes < min_rows):
        while sizes[short] < min_rows:
            largest = int(sizes.argmax())
            parts[short] = np.append(parts[short], parts[largest][-1])
            parts[largest] = parts[largest][:-1]
            sizes[short] += 1
            sizes[largest] -= 1
