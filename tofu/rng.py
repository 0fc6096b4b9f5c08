"""Random generators derived from the run's seed and a purpose, so that no draw depends on the order of others."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from the parts (the run's seed, the round, the client, the purpose) by SHA-256."""
    return int.from_bytes(derive_bytes(*parts)[:8], "little") >> 1


def derive_bytes(*parts: int | str) -> bytes:
    """Derive 32 bytes from the parts. They are not secret: anyone who knows the run's seed can derive them."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()


def derive_generator(*parts: int | str) -> torch.Generator:
    """Return a generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
