"""Settings of one worker, for pools whose workers differ. Knows no other settings, and no tensors."""

import re

import msgspec

from kvrelay.errors import InvalidConfig
from kvrelay.field_checks import check_at_least, check_choice, check_chunk
from kvrelay.types import Role, WorkerId

DEVICES = ("auto", "cpu", "cuda")
OWN = ("device", "num_kv_blocks", "max_num_seqs", "prefill_chunk_tokens")  # what each worker may have its own
WORKER_ID = re.compile(r"[A-Za-z0-9_-]{1,32}")


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker of a pool whose workers differ (`[[workers]]` in TOML); None takes the engine's setting.

    `power_model` is this worker's alone: `idle_w=5,busy_w=20`.

    Raises `InvalidConfig` or `UnknownName`, naming the field.
    """

    role: Role
    worker_id: str | None = None
    device: str | None = None
    threads: int | None = None
    num_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    prefill_chunk_tokens: int | None = None
    power_model: str | None = None

    def __post_init__(self) -> None:
        if self.device is not None:
            check_choice("workers.device", self.device.split(":")[0], DEVICES)
        for field in ("threads", "num_kv_blocks", "max_num_seqs"):
            check_at_least(f"workers.{field}", getattr(self, field), 1)
        check_chunk("workers.prefill_chunk_tokens", self.prefill_chunk_tokens)
        if self.worker_id is not None and not WORKER_ID.fullmatch(self.worker_id):
            raise InvalidConfig(
                f"workers.worker_id={self.worker_id!r}: expected letters, digits, - and _, at most 32"
            )
        if self.power_model is not None and (":" in self.power_model or ";" in self.power_model):
            raise InvalidConfig(
                f"workers.power_model={self.power_model!r}: expected one worker's idle_w=…,busy_w=…"
            )


def check_workers(workers: tuple[WorkerSettings, ...], worker_ids: list[WorkerId]) -> None:
    """Raise `InvalidConfig` unless the listed workers make an engine, each with an id of its own."""
    roles = {settings.role for settings in workers}
    if roles != {"colocated"} and not {"prefill", "decode"} <= roles:
        raise InvalidConfig(f"workers: roles {sorted(roles)}: expected prefill and decode, or colocated only")
    if "colocated" in roles and len(roles) > 1:
        raise InvalidConfig("workers: colocated workers cannot be mixed with prefill or decode")
    twice = sorted({worker_id for worker_id in worker_ids if worker_ids.count(worker_id) > 1})
    if twice:
        raise InvalidConfig(f"workers.worker_id={twice[0]!r}: two workers have it")
