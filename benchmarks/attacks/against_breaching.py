"""Our Inverting Gradients against that of the package `breaching`: same gradient, same attack, one thread each.

    python3 -m venv /tmp/breaching
    /tmp/breaching/bin/pip install torch breaching hydra-core lpips pyyaml datasets transformers
    python -m benchmarks.attacks.against_breaching --python /tmp/breaching/bin/python

One step on one and on four images, labels known, untrained LeNet with smooth activations; the same objective (cosine,
the same weight of the total variation; none on grey images, which theirs does not take), signed Adam of step 0.1 with
the same schedule, one start each of its own noise, as many max_evals. What differs: our start has deviation 0.3 and
theirs 1, and their total variation is a mean over differences otherwise than ours.
"""

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from attacks.inverting import Inverting
from attacks.messages import local_round, observe, parse_message
from attacks.metrics import score
from attacks.observation import Observation
from attacks.trials import OTHERS, Scenario, drawn_clients, open_clients, trained_network
from benchmarks.common import find_data, print_table, run_command, spread, write_results
from tofu.data import to_float
from tofu.rng import derive_generator
from tofu.training import LocalTrainingConfig

MODEL = "lenet-smooth"


def theirs(
    python: Path, observation: Observation, attack: Inverting, labels: Tensor, seed: int
) -> tuple[Tensor, float]:
    """Images and seconds of `breaching`, in a process of its own."""
    network = observation.network
    arrays: dict[str, Any] = {"labels": labels.numpy(), "seed": seed, "max_evals": attack.max_evals,
                              "variation": attack.variation, "shape": list(vars(network.shape).values())}  # fmt: skip
    for i, name in enumerate(network.param_spec.parameters):
        arrays |= {f"weight{i}": network.base[name].numpy(), f"gradient{i}": observation.gradient[name].numpy()}
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(given, **arrays)
        environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
        command = [str(python), "-m", "benchmarks.attacks.breaching_inversion", str(given), str(found)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        result = np.load(found)
        return torch.from_numpy(result["images"]).float(), float(result["seconds"])


def one_case(name: str, data: str, size: int, seed: int, max_evals: int, python: Path) -> list[dict[str, Any]]:
    """A row for each implementation."""
    scenario = Scenario(data, MODEL, "group", 0.1, seed, 0, size, 1, 1, True)
    network, images = trained_network(scenario), drawn_clients(scenario, 1)[0]
    generator = derive_generator(seed, "against breaching", size)
    sent = local_round(network, images, LocalTrainingConfig(1, size, 0.1), generator)
    seen = observe(parse_message("exact"), [sent], generator=generator, know_labels=True)
    attack = Inverting(restarts=1, max_evals=max_evals, variation=1e-4 if network.shape.channels == 3 else 0.0)
    began = time.perf_counter()
    own = attack.run(seen, generator=generator).images
    seconds = time.perf_counter() - began
    assert own is not None
    rows = []
    for who, found, took in (("ours", own, seconds), ("breaching", *theirs(python, seen, attack, images.labels, seed))):
        scores = score(found, None, truth=to_float(images.images), true_labels=images.labels,
                       others=to_float(open_clients(scenario).test().images[:OTHERS]),
                       classes=images.classes)  # fmt: skip
        rows.append({"data": name, "batch_size": size, "seed": seed, "who": who, "psnr": scores.psnr,
                     "recovered": scores.recovered, "seconds": took})  # fmt: skip
    return rows


def main(
    python: Annotated[Path, typer.Option(help="a Python that has breaching")],
    seeds: int = 3,
    max_evals: int = 1000,
) -> None:
    """Our Inverting Gradients against that of the package `breaching`: same gradient, same attack, one thread each."""
    torch.set_num_threads(1)
    rows = []
    for name, data in (("digits", "digits"), ("cifar10", find_data("cifar10", "uoft-cs/cifar10"))):
        for size in (1, 4):
            for seed in range(seeds):
                rows += one_case(name, data, size, seed, max_evals, python)
                scores = ", ".join(f"{row['who']} {row['psnr']:.1f} dB in {row['seconds']:.0f} s" for row in rows[-2:])
                print(f"{name}, batch {size}, seed {seed}: {scores}", flush=True)
    table = []
    for name, size in dict.fromkeys((row["data"], row["batch_size"]) for row in rows):
        mine, other = (
            [row for row in rows if (row["data"], row["batch_size"], row["who"]) == (name, size, who)]
            for who in ("ours", "breaching")
        )
        ratio = [a["seconds"] / b["seconds"] for a, b in zip(mine, other, strict=True)]
        table.append((name, str(size), spread([r["psnr"] for r in mine], 1), spread([r["psnr"] for r in other], 1),
                      spread(ratio, 2)))  # fmt: skip
    print_table(("data", "batch", "ours, dB", "breaching, dB", "our time over theirs"), table)
    settings = {"seeds": seeds, "max_evals": max_evals, "model": MODEL}
    write_results("attacks-breaching", script="attacks.against_breaching", settings=settings, rows=rows)


if __name__ == "__main__":
    run_command(main)
