"""Random generators derived from the run's seed and a place in the run, so that no draw depends on another's order."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts (the run's seed, the round, the client, the purpose), by SHA-256."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def derive_generator(*parts: int | str) -> torch.Generator:
    """A generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
