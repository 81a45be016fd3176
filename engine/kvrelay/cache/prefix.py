"""Names for KV blocks by their content: equal exactly when the tokens, all before them and the setting are.

A fixed hash chain (BLAKE2b, never Python's `hash`), so that workers, routers, files and restarts agree.
Knows token ids and settings; what is cached where is the pool's and the router's to know.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvrelay.sampling_params import SamplingParams
from kvrelay.sparse import GROUP_TOKENS, SELECTION, SparseAttention, shareable_tokens, sparse_settings
from kvrelay.types import BLOCK_SIZE, RequestSpec

HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Prefixes:
    """How one engine names blocks: `fingerprint` is its KV layout's; None names nothing, so nothing is found.

    With sparse attention a block's KV depends on its whole selection group, and on whether its tokens were a
    prompt: only whole groups of prompts have names, prefixes are shared at group borders, and each setting
    has names of its own.
    """

    fingerprint: str | None = None
    attention: str | SparseAttention = "dense"

    @property
    def unit_tokens(self) -> int:
        """Shared prefixes, and chunks, end at multiples of this."""
        return BLOCK_SIZE if sparse_settings(self.attention) is None else GROUP_TOKENS

    def names_of(self, request: RequestSpec) -> list[bytes]:
        """Names of the full blocks that prefill need not compute for the request, if they are found.

        None for one that wants log-probabilities of its prompt: they come of computing it.
        """
        if request.prompt_logprobs is not None:
            return []
        token_ids = request.token_ids[: request.num_prefill_tokens]
        return self.names(request.params, token_ids, request.num_prompt_tokens)

    def names(self, params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int) -> list[bytes]:
        """Names of the full blocks of a request's tokens, of which all but the prompt's were generated."""
        if self.fingerprint is None:
            return []
        sparse = sparse_settings(params.attention or self.attention)
        if sparse is None:
            return block_hashes(token_ids, self.fingerprint, params.cache_salt)
        count = shareable_tokens(min(len(token_ids), num_prompt_tokens - 1), sparse)
        namespace = f"{self.fingerprint} {SELECTION} {msgspec.json.encode(sparse).decode()}"
        return block_hashes(token_ids[:count], namespace, params.cache_salt)


NO_PREFIXES = Prefixes()


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
