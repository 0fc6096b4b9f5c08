"""A federation of hospitals on a table: python examples/tabular.py [--rounds N] [--folder RUN].

The data are scikit-learn's breast cancer table; each of four "hospitals" sees tumors of another size, so their data
differ as those of real sites do. The same from a CSV file, without Python:

    tofu run --dataset DATA/tumors.csv --label-column diagnosis --client-column hospital --partition natural
"""

import torch
import typer
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

import tofu


def scaled(rows):
    """Each site scales its features by its own statistics, so none of them leave it."""
    rows = torch.tensor(rows).float()
    return (rows - rows.mean(0)) / rows.std(0)


def main(rounds: int = 10, folder: str = "") -> None:
    features, labels = load_breast_cancer(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        features, labels, test_size=0.25, random_state=0, stratify=labels
    )
    radius = train_x[:, 0].argsort(kind="stable")
    large = radius[len(radius) // 2 :]
    hospitals = [
        TensorDataset(scaled(train_x[rows]), torch.tensor(train_y[rows]))
        for rows in (radius[::4], radius[1::4], large[::2], large[1::2])
    ]
    result = tofu.run(
        clients=hospitals,
        test=TensorDataset(scaled(test_x), torch.tensor(test_y)),
        model=lambda: nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2)),
        metrics={"auc": lambda outputs, targets: roc_auc_score(targets, outputs.softmax(1)[:, 1])},
        rounds=rounds,
        local_epochs=2,
        lr=0.1,
        ratio=20,
        client_test_fraction=0.2,
        run_folder=folder,
    )
    last, lowest = result.history[-1], result.history[-1].accuracy_quantiles["0"]
    print(f"accuracy {last.accuracy:.3f}, AUC {last.metrics['auc']:.3f}, lowest hospital {lowest:.3f}")
    print(f"uplink {result.summary.uplink_ratio:.0f} times smaller than FedAvg's; report: {result.report()}")


if __name__ == "__main__":
    typer.run(main)
