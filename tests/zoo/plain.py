"""Federated averaging in plain torch, with which the runs of the zoo are compared."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tofu.data import FederatedData, to_float
from tofu.models.checks import eager_code
from tofu.rng import GlobalGenerators, derive_generator, reseed_own
from tofu.training import SeededDropout, shuffled_batches


def averaged(
    factory: Callable[..., nn.Module], data: FederatedData, *, rounds: int, batch_size: int, lr: float
) -> nn.Module:
    """Train a model in rounds of one epoch per client with `torch.optim.SGD`, and average states by numbers of images.

    The order of images and the numbers that layers draw are those of a run with seed 0.
    """
    with eager_code(), torch.set_grad_enabled(True):
        with GlobalGenerators(0):
            model = factory(**{name: getattr(data.shape, name) for name in ("channels", "height", "width", "classes")})
            model.eval()(torch.zeros(2, *data.shape.chw))  # initializes lazy layers
        torch.set_grad_enabled(True)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.contiguous()  # expanded tensors cannot be written to
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parts = [data.client(number) for number in range(data.clients)]
        counts = [len(part) for part in parts]
        for round_ in range(1, rounds + 1):
            states = []
            for number, part in enumerate(parts):
                model.load_state_dict(start)
                generator = derive_generator(0, round_, str(number), "train")
                _train(model, to_float(part.images), part.labels, generator, batch_size, lr)
                states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            start = {name: _mean([state[name] for state in states], counts) for name in start}
        model.load_state_dict(start)
    return model


def _train(
    model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, batch_size: int, lr: float
) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    reseed_own(model, generator.initial_seed())
    with GlobalGenerators(generator.initial_seed()):
        for rows in shuffled_batches(len(images), batch_size, generator):
            with SeededDropout(generator):
                outputs = model(images[rows])
            optimizer.zero_grad()
            F.cross_entropy(outputs, labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def _mean(tensors: list[Tensor], counts: list[int]) -> Tensor:
    first = tensors[0]
    if first.dtype in (torch.bool, torch.float64) or first.is_complex() or all(first.equal(each) for each in tensors):
        return first
    mean = sum(count * each.double() for count, each in zip(counts, tensors, strict=True)) / sum(counts)
    return (mean if first.is_floating_point() else mean.round()).to(first.dtype)
