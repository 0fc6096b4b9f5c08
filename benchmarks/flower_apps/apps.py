"""The example apps: what is changed in them, and with how much data and how many clients they run here."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_CHANGED_LINES = 10

SPARSE = 'compressor="sparse"'
"""Arguments of `tofu.compress` for the sparse correction alone, which needs no model."""

Edit = tuple[str, str, str]
"""File of the app, a string that occurs in it once, and what replaces it."""


@dataclass(frozen=True)
class App:
    """One example app.

    Attributes:
        package: the folder with the app's `client_app.py` and `server_app.py`.
        strategy: the expression in `server_app.py` that builds the strategy.
        codec: arguments that `tofu.compress` and `tofu.Compressed` get.
        imports: what the arguments need in `client_app.py` and `server_app.py`, if they do not import it anyway.
        mods: the beginning of the app's own list of mods, if it has one.
        metric: in the server's evaluation or, without one, in the clients' mean.
        falls: the metric is a loss.
        clients, examples, test: number of clients, training rows and test rows.
        config: entries of the run config that differ from the app's.
        without: variants that the app is too small for, or that its framework does not have: proxies need torch.
        needs: packages of the app that this project does not need.
        server_import: a line of `server_app.py` after which imports are added.
    """

    package: str
    strategy: str
    codec: str
    imports: tuple[str, str] = ("", "")
    mods: str = ""
    metric: str = "accuracy"
    falls: bool = False
    clients: int = 10
    examples: int = 4000
    test: int = 2000
    config: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    server_import: str = "from flwr.serverapp import Grid, ServerApp\n"

    def edits(self, variant: str, options: str = "") -> list[Edit]:
        """What has to be changed in the app; nothing for the variant `plain`.

        Args:
            options: more arguments of `tofu.compress` and `tofu.Compressed`.
        """
        if variant == "plain":
            return []
        codec = ", ".join(filter(None, [SPARSE if variant == "sparse" else self.codec, options]))
        client, server = f"{self.package}/client_app.py", f"{self.package}/server_app.py"
        mod, wrapper = {
            "secure": ("tofu.secure()", "tofu.SecureAggregation(\\g)"),
        }.get(variant, (f"tofu.compress({codec})", f"tofu.Compressed(\\g, {codec})"))
        imports = ["import tofu\n" + (line if variant == "compress" else "") for line in self.imports]
        before = self.mods or "app = ClientApp()"
        after = f"{self.mods}\n        {mod}," if self.mods else f"app = ClientApp(mods=[{mod}])"
        return [
            (client, "from flwr.clientapp import ClientApp\n", f"from flwr.clientapp import ClientApp\n{imports[0]}"),
            (client, before, after),
            (server, self.server_import, self.server_import + imports[1]),
            (server, self.strategy, wrapper.replace("\\g", self.strategy)),
        ]  # fmt: skip


def changed(folder: Path, edits: list[Edit]) -> int:
    """Apply the edits to a copy of an app. Returns the number of lines that a diff marks as added.

    Raises:
        ValueError: a string does not occur exactly once in its file.
    """
    lines = 0
    before = {path: (folder / path).read_text() for path, _, _ in edits}
    after = dict(before)
    for path, old, new in edits:
        if after[path].count(old) != 1:
            raise ValueError(f"{path} contains {old!r} {after[path].count(old)} times, expected once")
        after[path] = after[path].replace(old, new)
    for path, text in after.items():
        difference = difflib.unified_diff(before[path].splitlines(), text.splitlines(), lineterm="", n=0)
        lines += sum(line.startswith("+") and not line.startswith("+++") for line in difference)
        (folder / path).write_text(text)
    return lines


_FIT = "FedAvg(\n        fraction_train=fraction_train,\n        fraction_evaluate=fraction_evaluate,\n    )"

APPS: dict[str, App] = {
    "quickstart-pytorch": App(
        "pytorchexample", "FedAvg(fraction_evaluate=fraction_evaluate)", "Net, (3, 32, 32)",
        config={"num-server-rounds": 10, "fraction-evaluate": 0.1},
    ),
    "advanced-pytorch": App(
        "pytorch_example",
        "CustomFedAvg(\n        fraction_train=fraction_train, fraction_evaluate=fraction_eval\n    )",
        "Net, (1, 28, 28)", clients=20, examples=8000, config={"fraction-evaluate": 0.05},
    ),
    "custom-mods": App(
        "custom_mods", "FedAvg(fraction_evaluate=fraction_evaluate)", "Net, (3, 32, 32)", mods="    mods=[",
        config={"num-server-rounds": 10, "fraction-evaluate": 0.1, "learning-rate": 0.05},
    ),
    "fl-tabular": App("fltabular", "FedAvg()", "IncomeClassifier, (14,)", ("", ""), clients=5, examples=8000),
    "quickstart-pytorch-lightning": App(
        "pytorchlightning_example", "FedAvg(fraction_train=0.5, fraction_evaluate=0.5)", "LitAutoEncoder, (784,)",
        ("from pytorchlightning_example.task import LitAutoEncoder\n", ""),
        metric="eval_loss", falls=True, config={"num-server-rounds": 5},
    ),
    "quickstart-huggingface": App(
        "huggingface_example", _FIT, 'lambda: get_model("prajjwal1/bert-tiny"), (8,)', clients=4, examples=400,
        test=100, config={"num-server-rounds": 3, "fraction-train": 1.0, "fraction-evaluate": 1.0},
    ),
    "federated-vae": App(
        "fedvaeexample", "FedAvg()", "Net, (3, 32, 32)", metric="loss", falls=True, clients=5,
        config={"num-server-rounds": 6, "learning-rate": 0.05},
    ),
    "quickstart-sklearn": App(
        "sklearnexample", "FedAvg(fraction_train=1.0, fraction_evaluate=1.0)", "", clients=5, examples=150, test=0,
        config={"penalty": "l2"}, without=("compress", "sparse"),
    ),
    "flowertune-vit": App(
        "vitexample",
        "FedAvg(\n        fraction_train=0.5,  # Sample 50% of available clients\n"
        "        fraction_evaluate=0.0,  # No federated evaluation\n    )",
        "get_model(10).heads, (96,)", examples=800, test=500, config={"num-classes": 10},
    ),
    "opacus": App(
        "opacus_fl",
        "FedAvg(\n        evaluate_metrics_aggr_fn=weighted_eval,\n"
        "        train_metrics_aggr_fn=aggregate_train,\n    )",
        "Net, (3, 32, 32)", metric="loss", falls=True, needs=("opacus",),
    ),
    "quickstart-mlx": App(
        "mlxexample", "FedAvg()", "", metric="accuracy", without=("compress",), needs=("mlx",),
        config={"batch-size": 32}, server_import="from flwr.server import Grid, ServerApp\n",
    ),
    "quickstart-pennylane": App(
        "quickstart_pennylane",
        "FedAvg(\n        fraction_train=fraction_fit,\n        fraction_evaluate=fraction_evaluate,\n    )",
        "QuantumNet, (3, 32, 32)", metric="loss", falls=True, examples=500, needs=("pennylane",),
        config={"num-server-rounds": 3},
    ),
}  # fmt: skip
"""The sizes make a run last a few minutes on one core."""
