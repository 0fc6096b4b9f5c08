"""Random generators derived from the run's seed and a purpose, so that no draw depends on the order of others."""

import hashlib
import random
import threading
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

_GLOBAL_LOCK = threading.RLock()


def derive_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from the parts (the run's seed, the round, the client, the purpose) by SHA-256."""
    return int.from_bytes(derive_bytes(*parts)[:8], "little") >> 1


def derive_bytes(*parts: int | str) -> bytes:
    """Derive 32 bytes from the parts. They are not secret: anyone who knows the run's seed can derive them."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()


def derive_generator(*parts: int | str) -> torch.Generator:
    """Return a generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def reseed_own(model: torch.nn.Module, seed: int) -> None:
    """Seed the generators of torch, numpy and Python that are attributes of modules, each with a seed of its own."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
                continue
            own = derive_seed(seed, name, attribute)
            if isinstance(value, torch.Generator):
                value.manual_seed(own)
            elif isinstance(value, np.random.Generator):
                value.bit_generator.state = type(value.bit_generator)(own).state
            elif isinstance(value, np.random.RandomState):
                value.seed(own % 2**32)
            elif isinstance(value, random.Random):
                value.seed(own)


class GlobalGenerators:
    """A context that seeds the global generators of torch, numpy and Python for one thread, and restores them.

    Layers and user code draw from these generators (`dropout2d`, `randn_like`, `numpy.random`), and the client threads
    of a process share them. Within the context, the draws of a thread depend on the seed only; other threads wait.

    Args:
        seed: seed of all generators.
        device: its generator is included if it is a GPU.
    """

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        self._seed = seed
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._held = False

    def __enter__(self) -> Self:
        _GLOBAL_LOCK.acquire()
        self._held = True
        self._before = self._states()
        # torch.manual_seed would also seed the generators of accelerators, which are not restored here.
        torch.default_generator.manual_seed(self._seed)
        if self._cuda is not None:
            torch.cuda.default_generators[self._cuda.index or 0].manual_seed(self._seed)
        np.random.seed(self._seed % 2**32)
        random.seed(self._seed)
        self._seeded = self._states()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    @property
    def unused(self) -> bool:
        """Whether nothing was drawn within the context; False after `release_if_unused` has released the generators."""
        return self._held and self._states() == self._seeded

    def release_if_unused(self) -> None:
        """Release the generators to other threads if nothing was drawn so far."""
        if self.unused:
            self._release()

    def _release(self) -> None:
        if not self._held:
            return
        self._held = False
        torch_state, cuda_state, numpy_state, python_state = self._before
        torch.default_generator.set_state(torch.frombuffer(bytearray(torch_state), dtype=torch.uint8))
        if self._cuda is not None:
            torch.cuda.set_rng_state(torch.frombuffer(bytearray(cuda_state), dtype=torch.uint8), self._cuda)
        name, keys, *rest = numpy_state
        np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))
        random.setstate(python_state)
        _GLOBAL_LOCK.release()

    def _states(self) -> tuple[bytes, bytes, tuple[Any, ...], tuple[Any, ...]]:
        """Return the states of the generators, comparable."""
        cuda = torch.cuda.get_rng_state(self._cuda).numpy().tobytes() if self._cuda is not None else b""
        name, keys, *rest = np.random.get_state(legacy=True)
        torch_state = torch.default_generator.get_state().numpy().tobytes()
        return torch_state, cuda, (name, np.asarray(keys).tobytes(), *rest), random.getstate()
