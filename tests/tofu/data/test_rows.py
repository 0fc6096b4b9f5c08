"""Tables and texts: reading, errors, partitions, and whole federations on them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv, parquet

import tofu
from tofu.data import LabeledRows, local_rows, open_rows, partition_by_id
from tofu.data.rows import token_ids
from tofu.errors import DataError, SettingError
from tofu.settings.fields import comma_list
from tofu.settings.groups import DataSettings

TABLE = {"feature_columns": "a,b", "label_column": "kind"}
WORDS = {"good": ("fine", "great", "happy"), "bad": ("poor", "awful", "sad")}


def write_table(path: Path, rows: int = 60, **changes: object) -> Path:
    """Rows whose class, a text, is the sign of a - b; `site` has three values."""
    rng = np.random.default_rng(rows)
    a, b = rng.normal(size=rows), rng.normal(size=rows)
    columns: dict[str, object] = {
        "a": a, "b": b, "kind": np.where(a > b, "up", "down"), "site": [f"s{n % 3}" for n in range(rows)],
    }  # fmt: skip
    table = pa.table(columns | changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        csv.write_csv(table, path)
    else:
        parquet.write_table(table, path)
    return path


def write_texts(path: Path, rows: int) -> Path:
    """Texts of neutral words with one that tells the class."""
    rng = np.random.default_rng(rows)
    names = list(WORDS)
    texts = [f"It was a {rng.choice(WORDS[names[n % 2]])} day, number {n % 7}." for n in range(rows)]
    return write_table(path, rows, text=texts, kind=[names[n % 2] for n in range(rows)])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_files_and_folders_of_both_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    write_table(tmp_path / "data" / f"train{suffix}")
    write_table(tmp_path / "data" / f"test{suffix}", 20)
    data = open_rows(str(tmp_path / "data"), **TABLE, clients=2, partition="iid", seed=0)
    assert (data.class_names, data.width, len(data.test)) == (("down", "up"), 2, 20)
    for rows in (*data.clients, data.test):
        assert torch.equal(rows.labels, (rows.inputs[:, 0] > rows.inputs[:, 1]).long())
    alone = open_rows(str(tmp_path / "data" / f"train{suffix}"), **TABLE, clients=2, partition="iid", seed=0)
    assert len(alone.test) + sum(map(len, alone.clients)) == 60  # without a test file, 15% of each class is held out
    assert len(alone.test) == 8


def test_test_rows_alone_are_a_servers_and_used_in_full(tmp_path: Path) -> None:
    write_table(tmp_path / "data" / "test.csv", 20)
    data = open_rows(str(tmp_path / "data"), **TABLE, clients=2, partition="dirichlet", seed=0)
    assert (len(data.test), [len(rows) for rows in data.clients]) == (20, [0, 0])


def test_the_natural_partition_takes_the_clients_with_the_most_rows(tmp_path: Path) -> None:
    sites = ["x"] * 30 + ["y"] * 20 + ["z"] * 10
    form = TABLE | {"client_column": "site"}
    write_table(tmp_path / "train.csv", site=sites)
    write_table(tmp_path / "test.csv", 9)
    data = open_rows(str(tmp_path), **form, clients=2, partition="natural", seed=0)
    assert data.names == ("x", "y")
    assert [len(rows) for rows in data.clients] == [30, 20]
    assert [set(rows.ids) for rows in data.clients if rows.ids is not None] == [{"x"}, {"y"}]
    with pytest.raises(SettingError, match=r"clients=4 .* at most 3"):
        open_rows(str(tmp_path), **form, clients=4, partition="natural", seed=0)
    with pytest.raises(SettingError, match="client-column"):
        open_rows(str(tmp_path), **TABLE, clients=2, partition="natural", seed=0)


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=60), st.integers(0, 3))
def test_natural_parts_are_disjoint_and_each_has_all_rows_of_one_name(ids: list[str], seed: int) -> None:
    parts, names = partition_by_id(np.array(ids), clients=len(set(ids)), seed=seed)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(len(ids)))
    assert [{ids[row] for row in part} for part in parts] == [{name} for name in names]


def test_client_scaling_uses_each_clients_own_mean_and_deviation(tmp_path: Path) -> None:
    form = {"feature_columns": "a,c", "label_column": "kind", "feature_scaling": "client"}
    data = open_rows(str(write_table(tmp_path / "t.csv", c=[5.0] * 60)), **form, clients=2, partition="iid", seed=0)
    for rows in data.clients:
        torch.testing.assert_close(rows.inputs[:, 0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
        torch.testing.assert_close(rows.inputs[:, 0].std(correction=0), torch.tensor(1.0))
        assert not rows.inputs[:, 1].any()  # a constant feature becomes 0


@given(st.text(max_size=300), st.integers(2, 5000), st.integers(1, 80))
def test_token_ids_are_in_range_and_padded(text: str, vocabulary: int, tokens: int) -> None:
    ids = token_ids(text, vocabulary=vocabulary, tokens=tokens)
    assert len(ids) == tokens
    words = sum(bool(each) for each in ids)
    assert all(1 <= each < vocabulary for each in ids[:words])
    assert not any(ids[words:])


def test_equal_words_have_equal_ids_wherever_they_stand() -> None:
    first, second = (token_ids(t, vocabulary=10**6, tokens=4) for t in ("Never, ever", "ever never!"))
    assert (first[0], first[2]) == (second[1], second[0])
    assert len({*first, *second}) == 5  # never, the comma, ever, the exclamation mark, padding


@pytest.mark.parametrize(
    ("form", "changes", "reason"),
    [
        (TABLE | {"feature_columns": "a,q"}, {}, "no column 'q'.* a, b, kind, site"),
        (TABLE | {"feature_columns": "site"}, {}, "text in column 'site'.*expected numbers"),
        ({"feature_columns": "a"}, {}, "no label column .* name it"),
        ({"feature_columns": "a", "label_column": "a"}, {"a": [-1] * 60}, "label -1"),
        (TABLE | {"class_names": "up"}, {}, "label 'down'.*expected one of up"),
        (TABLE, {"a": [None] * 60}, "none of 60 rows can be read.*column 'a'"),
        (TABLE, {"a": [float("inf")] * 60}, "row 0 has no finite number"),
        ({"text_column": "words", "label_column": "kind"}, {}, "no column 'words'"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(
    tmp_path: Path, form: dict[str, str], changes: dict[str, object], reason: str
) -> None:
    path = write_table(tmp_path / "t.parquet", **changes)
    with pytest.raises(DataError, match=reason):
        open_rows(str(path), **form, clients=2, partition="iid", seed=0)
    with pytest.raises(DataError, match=reason):
        local_rows(str(path), DataSettings(**form), comma_list(form.get("class_names", "")))


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"t\.parquet cannot be read"):
        open_rows(str(tmp_path / "t.parquet"), **TABLE, clients=2, partition="iid", seed=0)
    with pytest.raises(SettingError, match=r"dataset=.*missing\.csv"):
        open_rows(str(tmp_path / "missing.csv"), **TABLE, clients=2, partition="iid", seed=0)
    assert isinstance(local_rows(str(write_table(tmp_path / "own" / "t.csv")), DataSettings(**TABLE)), LabeledRows)


def test_a_federation_on_a_table_sends_proxies_of_its_vectors_and_learns(tmp_path: Path) -> None:
    result = tofu.run(
        dataset="breast-cancer", clients=3, rounds=3, local_epochs=2, lr=0.1, ratio=30, max_evals=30, progress=False,
        run_folder=str(tmp_path / "run"),
    )  # fmt: skip
    assert (result.summary.final_accuracy or 0) > 0.9
    assert (result.history[-1].explained_variance or 0) > 0.3
    assert (result.summary.payload_ratio or 0) >= 30


def test_a_federation_on_texts_sends_the_sparse_correction_and_learns(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts" / "train.csv", 120)
    write_texts(tmp_path / "texts" / "test.csv", 40)
    result = tofu.run(
        dataset=str(tmp_path / "texts"), text_column="text", label_column="kind", client_column="site",
        partition="natural", model="bag_of_words", vocabulary=500, tokens=16, clients=3, rounds=5, lr=0.5, ratio=5,
        local_epochs=3, run_folder=str(tmp_path / "run"), progress=False,
    )  # fmt: skip
    assert (result.summary.final_accuracy or 0) > 0.9


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"plugins": "ood"}, "plugins='ood' .* table dataset"),
        ({"model": "lenet5"}, "model='lenet5' .* mlp or package.module:factory"),
        ({"partition": "natural"}, "partition='natural' .* client_column"),
        ({"text_column": "t", "feature_columns": "a"}, "feature_columns='a'"),
    ],
)
def test_settings_that_need_other_data_are_refused(tmp_path: Path, settings: dict[str, str], reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        tofu.run(dataset="wine", clients=2, run_folder=str(tmp_path / "r"), progress=False, **settings)
