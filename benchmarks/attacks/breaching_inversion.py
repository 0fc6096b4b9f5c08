"""Inverting Gradients by the package `breaching`, run by the Python that has it: IN.npz OUT.npz.

Not part of the benchmark's own process: `breaching` pins other versions. Reads weights, gradient and labels, and writes
the reconstruction and the seconds it took.
"""

import sys
import time

import numpy as np
import torch

from attacks.networks import lenet_smooth
from tofu.data import ImageShape


def main() -> None:
    import breaching
    from omegaconf import OmegaConf

    torch.set_num_threads(1)
    given = np.load(sys.argv[1])
    shape = ImageShape(*given["shape"].tolist())
    model = lenet_smooth(shape.channels, shape.height, shape.width, shape.classes)
    count = len(list(model.parameters()))
    weights = [torch.from_numpy(given[f"weight{i}"]) for i in range(count)]
    gradient = [torch.from_numpy(given[f"gradient{i}"]) for i in range(count)]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)
    config = breaching.get_config(overrides=["attack=invertinggradients"]).attack
    config.optim.max_iterations = int(given["max_evals"])
    config.optim.callback = 10**9
    config.restarts.num_trials = 1
    config.regularization.total_variation.scale = float(given["variation"])
    if not given["variation"]:
        config.regularization = None
    config.impl.JIT = None
    images_shape = [shape.channels, shape.height, shape.width]
    about = OmegaConf.create({"shape": images_shape, "classes": shape.classes, "modality": "vision",
                              "mean": [0.5] * shape.channels, "std": [0.5] * shape.channels})  # fmt: skip
    torch.manual_seed(int(given["seed"]))
    attacker = breaching.attacks.prepare_attack(
        model, torch.nn.CrossEntropyLoss(), config, {"device": torch.device("cpu"), "dtype": torch.float}
    )
    labels = torch.from_numpy(given["labels"])
    server = [{"parameters": weights, "buffers": [], "metadata": about}]
    sent = [{"gradients": gradient, "buffers": None,
             "metadata": {"num_data_points": len(labels), "labels": labels, "local_hyperparams": None}}]  # fmt: skip
    began = time.perf_counter()
    found, _ = attacker.reconstruct(server, sent, {}, dryrun=False)
    np.savez(sys.argv[2], images=found["data"].detach().numpy(), seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
