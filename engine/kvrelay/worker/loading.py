"""From a worker's settings to its model, pages and transport.

Decides what `auto` means here: the device, the dtype, the size of the pool.
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import torch

from kvrelay.attention.crossover import Place, measured
from kvrelay.cache.memory import DTYPES, memory_bytes
from kvrelay.cache.pool import BlockPool
from kvrelay.cache.store import KVStore
from kvrelay.config import EngineConfig, WorkerConfig
from kvrelay.decode_steps import DecodeSteps
from kvrelay.errors import InvalidConfig
from kvrelay.models.decoder import Decoder
from kvrelay.models.loading import load_model
from kvrelay.models.native import NativeDecoder
from kvrelay.models.spec import ModelSpec
from kvrelay.models.weights import weights_digest
from kvrelay.runner import Runner
from kvrelay.transport import open_transport
from kvrelay.transport.base import InprocHub, Site
from kvrelay.types import KVLayout, num_blocks
from kvrelay.wire import Descriptor, Message
from kvrelay.worker.backing import open_backing
from kvrelay.worker.parts import WorkerParts

CPU_MEMORY_SHARE = 0.25  # of the memory available at start, over all workers
CUDA_MEMORY_SHARE = 0.85  # of the device memory left after the weights
SEQUENCES_BY_DEFAULT = 8  # full-length sequences a CPU pool is sized for, memory permitting


def load_parts(
    config: WorkerConfig, hub: InprocHub | None, send: Callable[[Message], None]
) -> tuple[WorkerParts, Descriptor]:
    """Load everything one worker needs. Raises `ModelError`, `InvalidConfig` or `TransportError`."""
    torch.set_num_threads(config.num_threads)  # of the whole process: workers that are threads share it
    directory = Path(config.model_directory)
    spec = ModelSpec.from_directory(directory).scaled(config.engine.rope_scaling)
    device = choose_device(config.engine.device, config.index)
    dtype = choose_dtype(config.engine.dtype, spec.dtype_name, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif config.cores:
        os.sched_setaffinity(0, config.cores)  # before any thread of ours: they inherit it
    decoder = load_model(
        directory, device, DTYPES[dtype], config.engine.model_impl, config.engine.rope_scaling
    )
    layout = KVLayout(
        model=model_identity(directory, config.engine.rope_scaling),
        dtype=dtype,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
    )
    sparse = measured(config.engine.sparse(), place_of(config, layout, spec, device))
    if sparse is not None:
        assert sparse.dense_below_tokens != "auto"
        layout = msgspec.structs.replace(
            layout,
            dense_below_tokens=sparse.dense_below_tokens,
            decode_dense_below_tokens=sparse.decode_dense_below_tokens,
        )
    count = size_pool(config.engine, layout, spec, device, config.num_workers)
    has_steps = has_decode_steps(config.engine, decoder)
    site = Site(worker_id=config.worker_id, epoch=config.epoch, run_directory=config.run_directory, hub=hub)
    transport = open_transport(config.engine.transport, site)
    try:
        buffer = transport.allocate(memory_bytes(layout, count, keeps_stats=sparse is not None))
        store = KVStore(
            layout, count, buffer, device, keeps_stats=sparse is not None, has_spare_page=has_steps
        )
        steps = open_steps(config, decoder, store, spec) if has_steps else None
        descriptor = transport.register(store)
        counters: Counter[str] = Counter()
        backing = open_backing(config, store, counters)
    except BaseException:
        transport.close()
        raise
    parts = WorkerParts(
        config=config,
        pool=BlockPool(count, backing),
        store=store,
        runner=Runner(decoder, store, frozenset(spec.eos_token_ids), sparse, steps),
        transport=transport,
        send=send,
        counters=counters,
        backing=backing,
    )
    return parts, descriptor


def place_of(config: WorkerConfig, layout: KVLayout, spec: ModelSpec, device: torch.device) -> Place:
    """Where this worker measures, for all of its engine: what differs between them is not among it."""
    listed = [(own.device, own.threads) for own in config.engine.workers or ()]
    workers = sorted(set(listed or [(config.engine.device, config.num_threads)]))
    return Place(layout=layout, num_q_heads=spec.num_q_heads, device=device, workers=workers)


def has_decode_steps(engine: EngineConfig, decoder: Decoder | NativeDecoder) -> bool:
    """Whether decode runs as `DecodeSteps`. Raises `InvalidConfig` where that was asked for and cannot be."""
    if engine.cuda_graphs != "uncaptured":
        return engine.cuda_graphs == "auto" and decoder.device.type == "cuda" and engine.sparse() is None
    if isinstance(decoder, NativeDecoder):
        raise InvalidConfig("cuda_graphs='uncaptured': expected model_impl='torch'; here it is native")
    if engine.sparse() is not None:
        raise InvalidConfig(f"cuda_graphs='uncaptured': expected dense attention, not {engine.attention!r}")
    return True


def open_steps(
    config: WorkerConfig, decoder: Decoder | NativeDecoder, store: KVStore, spec: ModelSpec
) -> DecodeSteps:
    """Decode steps for this worker's batches, captured where they are to be; says how long that took."""
    assert isinstance(decoder, Decoder)
    max_blocks = min(store.num_blocks, num_blocks(spec.max_position_embeddings))
    steps = DecodeSteps(decoder, store, config.engine.max_num_seqs, max_blocks)
    if store.device.type == "cuda" and config.engine.cuda_graphs == "auto":
        took_s = steps.capture()
        print(
            f"{config.worker_id}: CUDA graphs of {len(steps.sizes)} batch sizes up to {steps.sizes[-1]} "
            f"captured in {took_s:.1f} s",
            file=sys.stderr,
        )
    return steps


def choose_device(asked: str, index: int) -> torch.device:
    """`auto`: CUDA where there is one, workers spread over the boards; else the CPU."""
    has_cuda = torch.cuda.is_available()
    if asked.startswith("cuda") and not has_cuda:
        raise InvalidConfig(f"device={asked!r}: torch {torch.__version__} sees no CUDA device here")
    if asked == "cpu" or not has_cuda:
        return torch.device("cpu")
    if asked.startswith("cuda:"):
        return torch.device(asked)
    return torch.device("cuda", index % torch.cuda.device_count())


def choose_dtype(asked: str, checkpoint: str, device: torch.device) -> str:
    """`auto`: the checkpoint's on CUDA; on a CPU bfloat16 only where it multiplies bfloat16 natively."""
    if asked != "auto":
        if device.type == "cpu" and asked == "float16":
            raise InvalidConfig(
                "dtype='float16': a CPU multiplies float16 a hundred times slower; use float32"
            )
        return asked
    if device.type != "cpu":
        return checkpoint if checkpoint in DTYPES else "bfloat16"
    return "bfloat16" if _multiplies_bfloat16() and checkpoint != "float32" else "float32"


def size_pool(
    engine: EngineConfig, layout: KVLayout, spec: ModelSpec, device: torch.device, num_workers: int
) -> int:
    """Blocks of the pool of a worker with these settings: as asked, else what the memory share holds.

    Raises `InvalidConfig`, with the bytes needed, when that is none, does not fit, or cannot hold one
    sequence of the `max_model_len` that was asked for and no other listed worker can.
    """
    block_bytes = memory_bytes(layout, 1, keeps_stats=engine.sparse() is not None)
    length = min(engine.max_model_len or spec.max_position_embeddings, spec.max_position_embeddings)
    asked = engine.asked_blocks()
    if asked is None:
        available = _available_bytes(device, num_workers)
        count = available // block_bytes
        if device.type == "cpu":
            count = min(count, SEQUENCES_BY_DEFAULT * num_blocks(length))
        there_is = f"{available} may be used (num_kv_tokens takes more than that share)"
    else:
        count, there_is = asked, f"{_asked(engine)} takes {asked * block_bytes}"
        _check_fits(engine, block_bytes, device, num_workers)
    if count < 1:
        raise InvalidConfig(f"num_kv_blocks: one block needs {block_bytes} bytes; {there_is}")
    most = max([count, *(own.num_kv_blocks or 0 for own in engine.workers or ())])
    if engine.max_model_len is not None and most < num_blocks(length):
        needed = num_blocks(length) * block_bytes
        raise InvalidConfig(
            f"max_model_len={engine.max_model_len} needs {needed} bytes of KV for one sequence; {there_is}"
        )
    return count


def _available_bytes(device: torch.device, num_workers: int) -> int:
    """What a worker may take where nobody said how much."""
    available = psutil.virtual_memory().available * CPU_MEMORY_SHARE / num_workers
    if device.type == "cuda":
        available = min(available, torch.cuda.mem_get_info(device)[0] * CUDA_MEMORY_SHARE)
    return int(available)


def _check_fits(engine: EngineConfig, block_bytes: int, device: torch.device, num_workers: int) -> None:
    """Every worker's pool lies in host memory, where peers write; that of a board lies there once more."""
    asked = engine.asked_blocks() or 0
    listed = [own.num_kv_blocks or 0 for own in engine.workers or ()]
    total = sum(listed or [asked] * num_workers) * block_bytes
    if total > (there_is := psutil.virtual_memory().total):
        raise InvalidConfig(
            f"{_asked(engine)} needs {asked * block_bytes} bytes, {total} with all {num_workers} workers; "
            f"there are {there_is}"
        )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else total
    if asked * block_bytes > free:
        raise InvalidConfig(
            f"{_asked(engine)} needs {asked * block_bytes} bytes on {device}; {free} are free"
        )


def _asked(engine: EngineConfig) -> str:
    if engine.num_kv_tokens is not None:
        return f"num_kv_tokens={engine.num_kv_tokens}"
    return f"num_kv_blocks={engine.num_kv_blocks}"


def model_identity(directory: Path, rope_scaling: str | None = None) -> str:
    """16 hex digits of the configuration, the scaling and the weights, these as `weights_digest` covers them.

    What it equals for may share KV: between workers, and with files of an earlier engine.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    digest.update((rope_scaling or "").encode())
    digest.update(weights_digest(directory))
    return digest.hexdigest()[:16]


def _multiplies_bfloat16() -> bool:
    flags = _cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})  # "bf16": Arm


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    rows = path.read_text().splitlines() if path.exists() else []
    line = next((row for row in rows if row.lower().startswith(("flags", "features"))), "")
    return set(line.split())
