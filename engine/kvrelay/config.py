"""Settings: one owner and one default per field, validated by raising, never by editing.

The only place that reads the environment. Knows no tensors and starts nothing.
"""

import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvrelay.errors import InvalidConfig, UnknownName
from kvrelay.types import BLOCK_SIZE, Role, WorkerId

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
ATTENTION = ("dense",)
MODES = ("disaggregated", "colocated")
Mode = Literal["disaggregated", "colocated"]


def cache_home() -> Path:
    """Where pulled models live: `KVRELAY_HOME`, else `kvrelay` under the user's cache directory."""
    chosen = os.environ.get("KVRELAY_HOME")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "kvrelay"


def cuda_visible_devices() -> str | None:
    """The CUDA boards this process, and the workers it starts, may see; None when all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: its model, its workers, its transport and its limits.

    `num_kv_blocks` is per worker (None: sized from memory). `threads_per_worker=None` shares the host's
    cores out equally. `prefill_chunk_tokens=None` computes each prompt whole. `verify_kv` compares a digest
    of every block on both sides of the hand-off. `lease_s` is the longest silence of a KV writer, and
    `worker_timeout_s` the longest silence of a busy worker, before it is given up.

    Raises `InvalidConfig` or `UnknownName`, naming the field.
    """

    model: str
    mode: Mode = "disaggregated"
    prefill_workers: int = 1
    decode_workers: int = 1
    transport: str = "shm"
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "dense"
    policy: str = "least_loaded"
    max_model_len: int | None = None
    num_kv_blocks: int | None = None
    prefill_chunk_tokens: int | None = 512
    max_num_seqs: int = 64
    threads_per_worker: int | None = None
    meter: str = "auto"
    power_model: str | None = None
    verify_kv: bool = False
    lease_s: float = 30.0
    worker_timeout_s: float = 300.0
    start_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, MODES)
        _check_choice("device", self.device.split(":")[0], DEVICES)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("attention", self.attention, ATTENTION)
        at_least_one = ("prefill_workers", "decode_workers", "max_model_len", "num_kv_blocks", "max_num_seqs")
        for field in (*at_least_one, "threads_per_worker"):
            _check_at_least(field, getattr(self, field), 1)
        for field in ("lease_s", "worker_timeout_s", "start_timeout_s"):
            if not getattr(self, field) > 0:
                raise InvalidConfig(f"{field}={getattr(self, field)!r}: expected seconds above 0")
        chunk = self.prefill_chunk_tokens
        if chunk is not None and (chunk < BLOCK_SIZE or chunk % BLOCK_SIZE):
            raise InvalidConfig(f"prefill_chunk_tokens={chunk}: expected a multiple of {BLOCK_SIZE}, or None")

    @classmethod
    def of(cls, **settings: Any) -> "EngineConfig":
        """From keyword settings, types checked. Raises `InvalidConfig` naming the field and what exists."""
        unknown = sorted(settings.keys() - set(cls.__struct_fields__))
        if unknown:
            known = ", ".join(cls.__struct_fields__)
            raise InvalidConfig(f"{unknown[0]}: there is no such setting; there are {known}")
        try:
            return msgspec.convert(settings, cls)
        except msgspec.ValidationError as error:
            if isinstance(error.__cause__, InvalidConfig):  # our own checks, wrapped on the way out
                raise error.__cause__ from None
            what, _, path = str(error).partition(" - at `$.")
            field = path.rstrip("`")
            raise InvalidConfig(f"{field}={settings.get(field)!r}: {what}") from None

    def roles(self) -> list[tuple[WorkerId, Role]]:
        """The workers to start, `prefill-0, …, decode-0, …` or `colocated-0, …`."""
        if self.mode == "colocated":
            return [(WorkerId(f"colocated-{i}"), "colocated") for i in range(self.decode_workers)]
        prefill: list[tuple[WorkerId, Role]] = [
            (WorkerId(f"prefill-{i}"), "prefill") for i in range(self.prefill_workers)
        ]
        return prefill + [(WorkerId(f"decode-{i}"), "decode") for i in range(self.decode_workers)]

    def worker_threads(self) -> int:
        """Compute threads of each worker: as asked, else an equal share of the usable cores."""
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.threads_per_worker or max(1, usable // len(self.roles()))


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one worker is told, as JSON on its standard input, by the process that started it."""

    worker_id: WorkerId
    role: Role
    index: int
    epoch: int
    endpoint: str
    run_directory: str
    model_directory: str
    num_threads: int
    num_workers: int
    engine: EngineConfig


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UnknownName(f"{field}={value!r}: expected one of {', '.join(choices)}")


def _check_at_least(field: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InvalidConfig(f"{field}={value}: expected at least {least}")
