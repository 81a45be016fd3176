"""Options of every command that starts an engine, declared once. Their defaults are the settings' own."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

OPTIONS: dict[str, tuple[type, str]] = {
    "mode": (str, "disaggregated or colocated."),
    "prefill_workers": (int, "Prefill worker processes."),
    "decode_workers": (int, "Decode worker processes."),
    "transport": (str, "How KV moves: shm, inproc, nixl or faulty:OPTIONS."),
    "device": (str, "auto, cpu, cuda or cuda:N."),
    "dtype": (str, "auto, float32, bfloat16 or float16."),
    "attention": (str, "dense, sparse or auto."),
    "kv_handoff": (str, "full, or sparse: decode starts before all of a sparse request's KV has come."),
    "rope_scaling": (str, "yarn:4 runs four times the trained length."),
    "power_model": (str, "Watts to assume where no meter is: idle_w=5,busy_w=20, or by role or device."),
}


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `OPTIONS`; those that were given reach it as `engine`, by name."""

    @wraps(command)
    def run(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in OPTIONS}
        command(**given, engine={name: value for name, value in chosen.items() if value is not None})

    kept = [p for p in inspect.signature(command).parameters.values() if p.name != "engine"]
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[kind | None, typer.Option(help=text)],
        )
        for name, (kind, text) in OPTIONS.items()
    ]
    run.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
    return run
