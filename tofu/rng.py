"""Random generators derived from the run's seed and a place in the run, so that no draw depends on another's order."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts (the run's seed, the round, the client, the purpose), by SHA-256."""
    return int.from_bytes(derive_bytes(*parts)[:8], "little") >> 1


def derive_bytes(*parts: int | str) -> bytes:
    """32 bytes from the parts. Whoever knows the run's seed knows them: never a secret."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()


def derive_generator(*parts: int | str) -> torch.Generator:
    """A generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
