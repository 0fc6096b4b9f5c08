"""How well and how fast one update is encoded, and what each part of the codec is worth.

LeNet-5 on MNIST, two cases. Early: the update of one epoch over 6,000 images (SGD lr 0.02, batch 64) after three such
epochs on other images. Late: after eight epochs (lr 0.05, batch 32), what one of ten clients (Dirichlet 0.5) would send
in its sixth round: its update plus the residual that error feedback holds after five rounds at that ratio.

Cosine is of the decoded to the true update; time is that of the encode over that of the local epoch, same process, one
thread.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import find_data, joined, print_table, run_command, several, spread, write_results
from tofu.codec.compressor import ProxyCompressor
from tofu.codec.options import CompressorOptions, ProxySettings, paper_settings
from tofu.compression.error_feedback import ErrorFeedback
from tofu.data import LabeledImages, open_data
from tofu.models import build_model
from tofu.reference_model import ReferenceModel
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, cosine, difference, load_weights, weights_of
from tofu.wire import HEADER_BYTES

EPOCH = LocalTrainingConfig(epochs=1, batch_size=64, lr=0.02)
LATE_EPOCH = LocalTrainingConfig(epochs=1, batch_size=32, lr=0.05)
IMAGES = 6000

SMOOTH = ProxySettings()
PAPER = paper_settings()


def change(**fields: object) -> ProxySettings:
    return dataclasses.replace(SMOOTH, **fields)  # type: ignore[arg-type]


VARIANTS: dict[str, ProxySettings] = {
    "smooth (default)": SMOOTH,
    "without the twin (ReLU, max-pool)": change(smooth=False),
    "without the twin, Adam": change(smooth=False, optimizer="adam"),
    "surrogate_beta 0.1": change(surrogate_beta=0.1),
    "surrogate_beta 1": change(surrogate_beta=1.0),
    "surrogate_beta 4": change(surrogate_beta=4.0),
    "surrogate_beta 16": change(surrogate_beta=16.0),
    "labels on the simplex": change(labels="simplex"),
    "one scale": change(scale="one"),
    "Adam in place of L-BFGS": change(optimizer="adam"),
    "Adam, 200 max_evals": change(optimizer="adam", max_evals=200),
    "labels not solved again": change(solve_labels=0),
    "proxies of 7x7": change(size=7),
    "proxies of 10x10": change(size=10),
    "proxies of 14x14": change(size=14),
    "proxies of 28x28 (no upsampling)": change(size=28),
    "4 bits": change(bits=4),
    "16 bits": change(bits=16),
    "32 bits": change(bits=32),
    "30 max_evals": change(max_evals=30),
    "120 max_evals": change(max_evals=120),
    "200 max_evals, no early stop": change(max_evals=200, tolerance=0.0),
    "paper mode": PAPER,
    "paper mode, 28x28": dataclasses.replace(PAPER, size=28),
    "paper mode, 1000 max_evals, no early stop": dataclasses.replace(PAPER, max_evals=1000, tolerance=0.0),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One seed's network at the base weights, its update, the one before, and the seconds of the local epoch."""

    network: ReferenceModel
    update: Weights
    earlier: Weights
    earlier_base: Weights
    epoch_seconds: float


def make_case(data: LabeledImages, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    parts = [data.subset(order[i * IMAGES : (i + 1) * IMAGES]) for i in range(4)]
    model = build_model("lenet5", data.shape, seed=seed)
    for part in parts[:2]:
        train_locally(model, part, EPOCH, generator=generator)
    earlier_base = weights_of(model)
    train_locally(model, parts[2], EPOCH, generator=generator)
    base = weights_of(model)
    seconds = []
    for repeat in range(3):  # the same epoch thrice for its time; the first is the update
        load_weights(model, base)
        result = train_locally(model, parts[3], EPOCH, generator=torch.Generator().manual_seed(1000 + seed))
        seconds.append(result.seconds)
        if repeat == 0:
            update = difference(weights_of(model), base)
    load_weights(model, base)
    earlier = difference(base, earlier_base)
    return Case(ReferenceModel(model.eval(), data.shape), update, earlier, earlier_base, statistics.median(seconds))


def make_late_case(source: str, seed: int, ratio: float) -> Case:
    """The early case's model moves on; a client's residual is what the default codec leaves at this ratio."""
    data = open_data(source, clients=10, partition="dirichlet", alpha=0.5, seed=seed)
    everyone = open_data(source, clients=1, partition="iid", seed=seed).client(0)
    client = data.client(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(everyone), generator=generator)
    parts = [everyone.subset(rows) for rows in torch.split(order, IMAGES)]
    model = build_model("lenet5", data.shape, seed=seed)
    network = ReferenceModel(model, data.shape)
    for part in parts[:8]:
        train_locally(model, part, LATE_EPOCH, generator=generator)
    feedback = ErrorFeedback()
    for round_ in range(6):
        base = weights_of(model)
        result = train_locally(model, client, LATE_EPOCH, generator=generator)
        target = feedback.target(difference(weights_of(model), base), round_ - 1)
        load_weights(model, base)
        model.eval()
        if round_ < 5:
            codec = ProxyCompressor(network, ratio=ratio, options=CompressorOptions(encoder=SMOOTH))
            decoded = codec.compress(network, target, generator=generator).decoded
            feedback = ErrorFeedback.after(target, decoded, round_)
            train_locally(model, parts[8 + round_ % 2], LATE_EPOCH, generator=generator)  # as the others would move it
    return Case(network, target, target, base, result.seconds)


def measure(case: Case, ratio: float, settings: ProxySettings, seed: int, memory: bytes = b"") -> dict[str, float]:
    compressor = ProxyCompressor(case.network, ratio=ratio, options=CompressorOptions(encoder=settings))
    began = time.perf_counter()
    compressed = compressor.compress(
        case.network, case.update, generator=torch.Generator().manual_seed(seed), memory=memory
    )
    seconds = time.perf_counter() - began
    decoded = compressor.decompress(case.network, compressed.body)  # what the server would see
    payload = HEADER_BYTES + len(compressed.body)
    return {
        "cosine": cosine(case.update, decoded),
        "seconds_over_epoch": seconds / case.epoch_seconds,
        "max_evals": compressed.evals,
        "payload_bytes": payload,
        "ratio": case.network.param_spec.float32_bytes / payload,
        "proxies": compressor.count,
    }


def warm_memory(case: Case, ratio: float, settings: ProxySettings, seed: int) -> bytes:
    """The proxies of the epoch before, as a client would remember them."""
    base = weights_of(case.network.model)
    load_weights(case.network.model, case.earlier_base)
    compressor = ProxyCompressor(case.network, ratio=ratio, options=CompressorOptions(encoder=settings))
    generator = torch.Generator().manual_seed(500 + seed)
    memory = compressor.compress(case.network, case.earlier, generator=generator).memory
    load_weights(case.network.model, base)
    return memory


def rows(early: list[Case], source: str, ratios: list[float], only: str) -> Iterator[dict[str, Any]]:
    for ratio in ratios:
        late = [make_late_case(source, seed, ratio) for seed in range(len(early))]
        for stage, cases in (("early", early), ("late", late)):
            for name, settings in VARIANTS.items():
                if only in name:
                    results = [measure(case, ratio, settings, seed) for seed, case in enumerate(cases)]
                    yield row(stage, name, ratio, results)
        for max_evals in (20, 60):
            settings = change(max_evals=max_evals)
            name = f"warm start, {max_evals} max_evals"
            if only in name:
                memories = [warm_memory(case, ratio, settings, seed) for seed, case in enumerate(early)]
                results = [measure(c, ratio, settings, s, memories[s]) for s, c in enumerate(early)]
                yield row("early", name, ratio, results)
        if only in "20 max_evals, cold":
            results = [measure(c, ratio, change(max_evals=20), s) for s, c in enumerate(early)]
            yield row("early", "20 max_evals, cold", ratio, results)


def row(stage: str, name: str, ratio: float, results: list[dict[str, float]]) -> dict[str, Any]:
    fields = {key: [result[key] for result in results] for key in results[0]}
    seconds = statistics.fmean(fields["seconds_over_epoch"])
    print(f"{stage} {ratio:g}x {name}: {spread(fields['cosine'])}, {seconds:.2f}", flush=True)
    return {"case": stage, "variant": name, "wanted_ratio": ratio, **fields}


def main(
    data: str = find_data("mnist", "ylecun/mnist"),
    seeds: int = 3,
    ratios: Annotated[Any, several(float)] = joined([64.0, 250.0]),
    only: Annotated[str, typer.Option(help="variants whose name contains this; results are then not written")] = "",
) -> None:
    """How well and how fast one update is encoded, and what each part of the codec is worth."""
    torch.set_num_threads(1)
    images = open_data(data, clients=1, partition="iid", seed=0).client(0)
    cases = [make_case(images, seed) for seed in range(seeds)]
    result = list(rows(cases, data, ratios, only))
    if not only:
        settings = {"data": "mnist", "model": "lenet5", "seeds": list(range(seeds)), "ratios": ratios}
        print(write_results("codec", settings=settings, rows=result))
    for stage in ("early", "late"):
        for ratio in ratios:
            print(f"\n{stage}, {ratio:g}x\n")
            print_table(
                ("variant", "proxies", "ratio", "cosine", "time / epoch", "max_evals"),
                [
                    (
                        r["variant"],
                        f"{r['proxies'][0]:.0f}",
                        f"{r['ratio'][0]:.0f}",
                        spread(r["cosine"]),
                        f"{statistics.fmean(r['seconds_over_epoch']):.2f}",
                        f"{statistics.fmean(r['max_evals']):.0f}",
                    )
                    for r in result
                    if (r["case"], r["wanted_ratio"]) == (stage, ratio)
                ],
            )


if __name__ == "__main__":
    run_command(main)
