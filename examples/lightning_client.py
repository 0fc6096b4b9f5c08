"""Clients that train with Lightning: python examples/lightning_client.py [--rounds N] [--folder RUN].

`tofu.run` calls a training function of yours; here it is a Lightning `Trainer` on a `LightningModule`.
"""

import logging

import lightning
import torch
import typer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tofu

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.lr = 0.1

    def forward(self, images):
        return self.layers(images)

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def train(model, dataset, context):
    model.lr = context.lr
    trainer = lightning.Trainer(
        max_epochs=context.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, barebones=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(dataset, context.batch_size, shuffle=True, generator=context.generator))
    return float(trainer.callback_metrics.get("loss", 0.0))


def main(rounds: int = 6, folder: str = "") -> None:
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 8 - 1
    result = tofu.run(
        clients=[TensorDataset(images[start:1500:3], labels[start:1500:3]) for start in range(3)],
        test=TensorDataset(images[1500:], labels[1500:]),
        model=Digits,
        train=train,
        rounds=rounds,
        local_epochs=2,
        workers=1,  # a Trainer is not made for several threads of one process
        ratio=40,
        run_folder=folder,
    )
    print(f"accuracy {result.summary.final_accuracy:.3f}, payloads {result.summary.payload_ratio:.0f} times smaller")


if __name__ == "__main__":
    typer.run(main)
