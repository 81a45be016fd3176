"""From which position on selection pays on this machine: measured once, remembered beside the models.

Knows shapes and times. The file is shared by every worker, so that all of them cut at the same position.
"""

import fcntl
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from kvrelay.attention.call import Call
from kvrelay.attention.spans import Span, runs_of
from kvrelay.cache.memory import memory_bytes
from kvrelay.cache.store import KVStore
from kvrelay.config import cache_home
from kvrelay.errors import InvalidConfig
from kvrelay.sparse import BLOCK_TOKENS, GROUP_TOKENS, SparseAttention
from kvrelay.types import KVLayout
from kvrelay.version import __version__
from kvrelay_kernels import measure_crossover
from kvrelay_kernels.cpu import cpu_backend
from kvrelay_kernels.cpu.native.library import instruction_set, library

FILE = "crossover.json"
MAX_TOKENS = 32768  # measured up to here; where selection never paid by then, it is not used at all
NEVER = 2**31 - 1
DECODE_BATCH = 4
BLOCKS_APART = (
    4.0  # and rows half as far as a deviation: of a prompt `top_p` then keeps about as many keys as of
)
ROWS_APART = 0.5  # text, 1,600 of 8K and 3,000 of 32K


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where it is measured: a worker's device, its model's shape, and what its engine's workers are.

    `workers` says how they compute, in JSON's types and the same words in each of them: the first to measure
    measures for all.
    """

    layout: KVLayout
    num_q_heads: int
    device: torch.device
    workers: Sequence[object] = ()


def measured(
    sparse: SparseAttention | None, place: Place, home: Path | None = None
) -> SparseAttention | None:
    """The settings with `dense_below_tokens` and `decode_dense_below_tokens` as numbers.

    What is timed is one group of prompt rows, and a small batch of generated ones, at the end of longer and
    longer sequences of random keys, alike within a block as a text's are: all of it dense, against selecting
    and reading what is selected. Takes seconds, once per machine, model shape and settings. Raises
    `InvalidConfig` where the file has no answer and cannot be written.
    """
    if sparse is None or sparse.dense_below_tokens != "auto":
        return sparse
    path = (cache_home() if home is None else home) / FILE
    always = msgspec.structs.replace(sparse, dense_below_tokens=0, decode_dense_below_tokens=None)
    prompt, generated = _remembered(path, _key(always, place), lambda: _measure(always, place))
    return sparse.with_crossover(prompt, generated)


def _measure(sparse: SparseAttention, place: Place) -> tuple[int, int]:
    prompt = _measure_phase(sparse, place, is_generated=False)
    return prompt, _measure_phase(sparse, place, is_generated=True)


def _measure_phase(sparse: SparseAttention, place: Place, *, is_generated: bool) -> int:
    rows, num_sequences = (1, DECODE_BATCH) if is_generated else (GROUP_TOKENS, 1)
    budget = sparse.budget(is_generated=is_generated)
    lengths = [int(budget * factor) // GROUP_TOKENS * GROUP_TOKENS for factor in (1.5, 2, 3, 4, 6, 8, 16)]
    lengths = [length for length in lengths if length <= MAX_TOKENS] or [2 * budget]
    blocks = max(lengths) // BLOCK_TOKENS
    layer = msgspec.structs.replace(place.layout, num_layers=1)
    tables = [range(number * blocks, (number + 1) * blocks) for number in range(num_sequences)]
    buffer = memoryview(bytearray(memory_bytes(layer, num_sequences * blocks, keeps_stats=True)))
    scratch = KVStore(layer, num_sequences * blocks, buffer, place.device, keeps_stats=True)
    scratch.pages.normal_()
    scratch.pages += BLOCKS_APART * torch.randn_like(scratch.pages[..., :1, :])
    for table in tables:
        scratch.refresh_stats(table, max(lengths))
    apart = torch.randn((num_sequences * rows, place.num_q_heads, layer.head_dim), device=place.device)
    q = (torch.randn_like(apart[:1]) + ROWS_APART * apart).to(scratch.pages.dtype)

    def run(length: int, chosen: SparseAttention | None) -> None:
        start = length - rows
        prompt_end = start if is_generated else length
        spans = [Span(start, rows, table, chosen, prompt_end) for table in tables]
        Call(runs_of(spans), spans, scratch.pages)(0, q, scratch.layer(0), scratch.stats(0))

    every_layer = msgspec.structs.replace(sparse, dense_layers=())
    found = measure_crossover(lambda n: run(n, None), lambda n: run(n, every_layer), lengths)
    return NEVER if found is None else found


def _key(sparse: SparseAttention, place: Place) -> str:
    """Everything the answer depends on; the same in all workers of an engine."""
    layout = place.layout
    kernels = library().kvr_sources() if instruction_set() else None
    boards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    parts = {
        "host": [platform.node(), *(boards or [platform.processor()])],
        "code": [cpu_backend(), kernels, __version__, torch.__version__],
        "workers": list(place.workers),
        "shape": [place.num_q_heads, layout.num_kv_heads, layout.head_dim, layout.dtype],
        "settings": msgspec.to_builtins(sparse),
    }
    return json.dumps(parts, sort_keys=True)


def _remembered(path: Path, key: str, measure: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """The file's answer, or a new one written to it; whoever comes second waits for the first."""
    known = _read(path)
    try:
        if key not in known:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                known = _read(path)
                if key not in known:
                    known[key] = measure()
                    file.truncate(0)
                    json.dump(known, file, indent=1)
    except OSError as error:
        raise InvalidConfig(
            f"dense_below_tokens='auto': {path} cannot be written ({error.strerror}); expected a number"
        ) from error
    return known[key]


def _read(path: Path) -> dict[str, tuple[int, int]]:
    """What is known so far; a file that is not ours to read is measured anew."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[int, int]])
    except (OSError, msgspec.DecodeError):
        return {}
