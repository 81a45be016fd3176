"""Names for KV blocks by their content: equal exactly when the tokens, all before them and the setting are.

A fixed hash chain (BLAKE2b, never Python's `hash`), so that workers, routers, files and restarts agree.
Knows token ids only; what is cached where is the pool's and the router's to know.
"""

import hashlib
import struct
from collections.abc import Sequence

from kvrelay.types import BLOCK_SIZE

HASH_BYTES = 16


def block_hashes(token_ids: Sequence[int], namespace: str, salt: str | None = None) -> list[bytes]:
    """One name of `HASH_BYTES` bytes per full block of 64 tokens; a last partial block has none.

    `namespace` is what the KV depends on besides the tokens (the layout's fingerprint). A `salt` keeps a
    tenant's blocks apart: without it they are neither found nor guessed. Each name covers the one before,
    so a name stands for the whole prefix that ends with its block.
    """
    count = len(token_ids) // BLOCK_SIZE
    block_bytes = 4 * BLOCK_SIZE
    data = struct.pack(f"<{count * BLOCK_SIZE}I", *token_ids[: count * BLOCK_SIZE])
    name = _root(namespace, salt)
    names = []
    for start in range(0, len(data), block_bytes):
        name = _digest(name + data[start : start + block_bytes])
        names.append(name)
    return names


def _root(namespace: str, salt: str | None) -> bytes:
    """The chain's start; lengths are told apart so that no (namespace, salt) pair reads as another."""
    parts = [namespace.encode()] if salt is None else [namespace.encode(), salt.encode()]
    return _digest(b"".join(struct.pack("<Q", len(part)) + part for part in parts))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()
