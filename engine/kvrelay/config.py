"""Settings: one owner and one default per field, validated by raising, never by editing.

The only place that reads the environment. Knows no tensors and starts nothing.
"""

import os
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from kvrelay.errors import InvalidConfig
from kvrelay.field_checks import check_at_least, check_choice, check_chunk, check_seconds
from kvrelay.sparse import SparseAttention, check_hand_off, check_whole_groups, sparse_settings
from kvrelay.types import Role, WorkerId, num_blocks
from kvrelay.worker_settings import DEVICES, OWN, WorkerSettings, check_workers

DTYPES = ("auto", "float32", "bfloat16", "float16")
MODEL_IMPLS = ("auto", "native", "torch")
CUDA_GRAPHS = ("auto", "off", "uncaptured")
MODES = ("disaggregated", "colocated")
Mode = Literal["disaggregated", "colocated"]
MAX_MEASURED_BUDGET = 65536  # tokens, up to which dense_below_tokens="auto" is measured
Settings = TypeVar("Settings", bound=msgspec.Struct)
SECONDS = ("lease_s", "worker_timeout_s", "start_timeout_s", "queue_timeout_s", "slo_ttft_s", "slo_itl_s")
LEAST = (
    ("max_queued_requests", 0),
    ("kv_host_bytes", 0),
    ("kv_file_bytes", 0),
    ("price_per_hour", 0),
    ("pue", 1),
    ("carbon_g_per_kwh", 0),
)


def cache_home() -> Path:
    """Where pulled models live: `KVRELAY_HOME`, else `kvrelay` under the user's cache directory."""
    chosen = os.environ.get("KVRELAY_HOME")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "kvrelay"


def api_key() -> str | None:
    """The key that clients of the server must send, if the environment sets one: `KVRELAY_API_KEY`."""
    return os.environ.get("KVRELAY_API_KEY")


def cuda_visible_devices() -> str | None:
    """The CUDA boards this process, and the workers it starts, may see; None when all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: its model, its workers, its transport and its limits.

    `num_kv_blocks`, or `num_kv_tokens` rounded up to blocks of 64, is per worker (both None: sized from
    memory). `rope_scaling="yarn:4"` runs sequences 4 times as long as the model was trained for.
    `threads_per_worker=None` shares the host's cores out equally; `pin_threads` gives each worker process
    cores of its own where their threads together are as many as the usable cores (CPU only). `model_impl` is
    what computes the layers: `native` C++ (CPU) or `torch`. `cuda_graphs`: `auto` replays dense decode steps
    on CUDA from graphs; `off`; `uncaptured` runs the same steps without graphs, on any device, to tell a
    fault of the one from a fault of the other. `prefill_chunk_tokens=None` computes each prompt
    whole. `verify_kv` compares a digest of every block on both sides of the hand-off. `kv_handoff="sparse"`
    lets a sparse request decode on the part of its KV that a token reads, while the rest still comes.
    `lease_s` is the longest silence of a KV writer, and `worker_timeout_s` that of a busy worker, before it
    is given up.

    A step computes at most `prefill_chunk_tokens` prompt tokens, of several prompts together, less the
    sequences that decode beside it. `prefix_cache` keeps KV blocks for later requests that begin with the
    same tokens, until their room is needed. Then they go to `kv_host_bytes` of host memory, and from there
    to `kv_file_bytes` of files in `kv_file_directory`, per worker, and come back when they are looked for.

    `workers` lists workers that differ, in place of `prefill_workers` and `decode_workers`. Requests that
    no worker can take wait in the router: at most `max_queued_requests` (None: any number), each at most
    `queue_timeout_s`. Prompts of which decode lacks at most `local_prefill_tokens` tokens are computed
    there (0: never; "auto": as many as a measurement at the start finds worth it). `slo_ttft_s` and
    `slo_itl_s` are what requests are held to. `price_per_hour` (any currency), `pue` and
    `carbon_g_per_kwh` turn joules and hours into costs; nothing is shown of those not given.
    `metrics_alias="vllm"` shows metrics that vLLM has under its names too; `served_model_name` (None: the
    end of `model`) is their `model_name`.
    `role_planner` lets the router change workers' roles by itself. `otel_endpoint` is where spans go, such
    as `http://localhost:4318/v1/traces` (extra `otel`).

    Raises `InvalidConfig` or `UnknownName`, naming the field.
    """

    model: str
    mode: Mode = "disaggregated"
    prefill_workers: int = 1
    decode_workers: int = 1
    transport: str = "shm"
    device: str = "auto"
    dtype: str = "auto"
    model_impl: str = "auto"
    cuda_graphs: str = "auto"
    attention: str | SparseAttention = "dense"
    kv_handoff: str = "full"
    policy: str = "least_loaded"
    max_model_len: int | None = None
    num_kv_blocks: int | None = None
    num_kv_tokens: int | None = None
    rope_scaling: str | None = None
    prefill_chunk_tokens: int | None = 512
    prefix_cache: bool = True
    kv_host_bytes: int = 0
    kv_file_bytes: int = 0
    kv_file_directory: str | None = None
    max_num_seqs: int = 64
    threads_per_worker: int | None = None
    pin_threads: bool = True
    meter: str = "auto"
    power_model: str | None = None
    verify_kv: bool = False
    lease_s: float = 30.0
    worker_timeout_s: float = 300.0
    start_timeout_s: float = 300.0
    workers: tuple[WorkerSettings, ...] | None = None
    max_queued_requests: int | None = None
    queue_timeout_s: float | None = None
    local_prefill_tokens: int | Literal["auto"] = 0
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None
    price_per_hour: float | None = None
    pue: float | None = None
    carbon_g_per_kwh: float | None = None
    metrics_alias: Literal["vllm"] | None = None
    served_model_name: str | None = None
    role_planner: bool = False
    otel_endpoint: str | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("device", self.device.split(":")[0], DEVICES)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("model_impl", self.model_impl, MODEL_IMPLS)
        check_choice("cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        at_least_one = ("prefill_workers", "decode_workers", "max_model_len", "num_kv_blocks", "max_num_seqs")
        for field in (*at_least_one, "threads_per_worker", "num_kv_tokens"):
            check_at_least(field, getattr(self, field), 1)
        for field in SECONDS:
            check_seconds(field, getattr(self, field))
        for field, least in LEAST:
            check_at_least(field, getattr(self, field), least)
        if self.local_prefill_tokens is None:
            raise InvalidConfig("local_prefill_tokens=None: expected 0 or more tokens, or 'auto'")
        if self.local_prefill_tokens != "auto":
            check_at_least("local_prefill_tokens", self.local_prefill_tokens, 0)
        if self.num_kv_tokens is not None and self.num_kv_blocks is not None:
            raise InvalidConfig(
                f"num_kv_tokens={self.num_kv_tokens}: expected one of it and "
                f"num_kv_blocks={self.num_kv_blocks}"
            )
        check_chunk("prefill_chunk_tokens", self.prefill_chunk_tokens)
        chunks = [self.prefill_chunk_tokens, *(own.prefill_chunk_tokens for own in self.workers or ())]
        if (sparse := self.sparse()) is not None:
            check_whole_groups(chunks)
            _check_measurable(sparse)
        check_hand_off(self.kv_handoff, self.sparse(), is_colocated=self.is_colocated)
        _check_tiers(self)
        if self.workers is not None:
            check_workers(self.workers, [worker_id for worker_id, _ in self.roles()])
        if self.mode == "colocated" and not self.is_colocated:
            raise InvalidConfig("mode='colocated': `workers` lists prefill and decode workers")

    @classmethod
    def of(cls, /, **settings: Any) -> "EngineConfig":
        """From keyword settings, types checked. Raises `InvalidConfig` naming the field and what exists."""
        return convert(cls, settings)

    @property
    def is_colocated(self) -> bool:
        """Whether each worker gets both halves of its requests, so that no KV is handed off."""
        return all(role == "colocated" for _, role in self.roles())

    def sparse(self) -> SparseAttention | None:
        """Settings of sparse attention; None is dense."""
        return sparse_settings(self.attention)

    def roles(self) -> list[tuple[WorkerId, Role]]:
        """The workers to start, `prefill-0, …, decode-0, …` or `colocated-0, …`, or those listed."""
        if self.workers is not None:
            return [(worker_id, settings.role) for worker_id, settings in self._listed()]
        if self.mode == "colocated":
            return [(WorkerId(f"colocated-{i}"), "colocated") for i in range(self.decode_workers)]
        prefill: list[tuple[WorkerId, Role]] = [
            (WorkerId(f"prefill-{i}"), "prefill") for i in range(self.prefill_workers)
        ]
        return prefill + [(WorkerId(f"decode-{i}"), "decode") for i in range(self.decode_workers)]

    def worker_threads(self, worker_id: WorkerId) -> int:
        """Compute threads of a worker: as asked, else an equal share of the usable cores."""
        usable = len(usable_cores()) or os.cpu_count() or 1
        listed = dict(self._listed()).get(worker_id)
        asked = listed.threads if listed is not None else None
        return asked or self.threads_per_worker or max(1, usable // len(self.roles()))

    def worker_cores(self, worker_id: WorkerId) -> tuple[int, ...]:
        """The cores a worker process is bound to; none when it may run anywhere."""
        threads = {worker: self.worker_threads(worker) for worker, _ in self.roles()}
        usable = usable_cores()
        if not self.pin_threads or sum(threads.values()) != len(usable):
            return ()
        before = list(threads)[: list(threads).index(worker_id)]
        first = sum(threads[worker] for worker in before)
        return usable[first : first + threads[worker_id]]

    def of_worker(self, worker_id: WorkerId) -> "EngineConfig":
        """The same settings as one worker has them; threads, and what others have, no longer depend on where.

        The cores that are usable where this is called are shared out, and `workers` tells what each one has.
        """
        listed = dict(self._listed())
        names = OWN if worker_id in listed else ()
        own = {name: value for name in names if (value := getattr(listed[worker_id], name)) is not None}
        if "num_kv_blocks" in own:
            own["num_kv_tokens"] = None
        own["threads_per_worker"] = self.worker_threads(worker_id)
        if self.workers is not None:
            own["workers"] = tuple(self._resolved(other, listed[other]) for other in listed)
        return msgspec.structs.replace(self, **own)

    def asked_blocks(self) -> int | None:
        """Blocks of each worker's pool that has no number of its own; None where memory decides."""
        return num_blocks(self.num_kv_tokens) if self.num_kv_tokens is not None else self.num_kv_blocks

    def served_name(self) -> str:
        """What the model is called outside: `served_model_name`, else the end of its name or path."""
        return self.served_model_name or Path(self.model).name

    def powers(self) -> str | None:
        """The power model with that of each listed worker in it, in the grammar of `energy.power_model`."""
        own = [f"{w}:{s.power_model}" for w, s in self._listed() if s.power_model is not None]
        return ";".join([*own, *filter(None, [self.power_model])]) or None

    def _resolved(self, worker_id: WorkerId, listed: WorkerSettings) -> WorkerSettings:
        return msgspec.structs.replace(
            listed,
            device=listed.device or self.device,
            threads=self.worker_threads(worker_id),
            num_kv_blocks=listed.num_kv_blocks or self.asked_blocks(),
        )

    def _listed(self) -> list[tuple[WorkerId, WorkerSettings]]:
        """The listed workers by id: their own, else their role and how many of it came before."""
        counts: dict[str, int] = {}
        found = []
        for settings in self.workers or ():
            number = counts[settings.role] = counts.get(settings.role, -1) + 1
            found.append((WorkerId(settings.worker_id or f"{settings.role}-{number}"), settings))
        return found


def usable_cores() -> tuple[int, ...]:
    """The cores this process may run on; none where the system does not say."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one worker is told, as JSON on its standard input, by the process that started it.

    `cores` are those it binds itself to on a CPU; none when it may run anywhere.
    """

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
    cores: tuple[int, ...] = ()


def convert(cls: type[Settings], settings: dict[str, Any]) -> Settings:
    """A struct from keyword settings, types checked. Raises `InvalidConfig` naming the field."""
    fields = cls.__struct_fields__
    unknown = sorted(settings.keys() - set(fields))
    if unknown:
        known = ", ".join(fields)
        raise InvalidConfig(f"{unknown[0]}: there is no such setting; there are {known}")
    try:
        return msgspec.convert(settings, cls)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, InvalidConfig):  # our own checks, wrapped on the way out
            raise error.__cause__ from None
        what, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`")
        raise InvalidConfig(f"{field}={_at(settings, field)!r}: {what}") from None


def _at(settings: object, path: str) -> object:
    """What is at `path`, as an error of msgspec gives it: `attention.dense_layers[0]`."""
    for name in re.findall(r"[^.\[\]]+", path):
        if isinstance(settings, dict):
            settings = settings.get(name)
        elif isinstance(settings, list | tuple):
            settings = settings[int(name)]
    return settings


def _check_measurable(sparse: SparseAttention) -> None:
    if sparse.dense_below_tokens != "auto":
        return
    for field in ("budget_tokens", "decode_budget_tokens"):
        if (getattr(sparse, field) or 0) > MAX_MEASURED_BUDGET:
            raise InvalidConfig(
                f"dense_below_tokens='auto': measured for {field} up to {MAX_MEASURED_BUDGET}; expected a "
                f"number with {field}={getattr(sparse, field)}"
            )


def _check_tiers(config: EngineConfig) -> None:
    if (config.kv_host_bytes or config.kv_file_bytes) and not config.prefix_cache:
        field = "kv_host_bytes" if config.kv_host_bytes else "kv_file_bytes"
        raise InvalidConfig(f"{field}={getattr(config, field)}: without prefix_cache nothing is looked for")
    if bool(config.kv_file_bytes) != (config.kv_file_directory is not None):
        raise InvalidConfig(
            f"kv_file_bytes={config.kv_file_bytes}, kv_file_directory={config.kv_file_directory!r}: "
            "expected both or neither"
        )
