"""vLLM with prefill and decode apart: two of its servers, NIXL between them, and the proxy that they need.

    python benchmarks/vllm_pair.py --vllm vllm --model M --host 127.0.0.1 --port 8107 --dtype bfloat16

Half of the cores for each, as `kvrelay-1P1D` has; left alone, vLLM's connector moves the threads of both
that compute to the last core. A completion goes to the prefill server for one token that nobody sees; its
answer says where the KV cache lies, and with that the request goes to the decode server, whose stream is
passed on as it comes. Where the answer does not say it, the client gets 502: decode would compute the prompt
itself. vLLM's environment needs the `nixl` package. Runs until it is told to stop.
"""

import argparse
import http.client
import json
import os
import shlex
import signal
import subprocess
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil

CONNECTOR = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
HEADERS = {"Content-Type": "application/json"}
TIMEOUT_S = 600.0


class Proxy(ThreadingHTTPServer):
    """Knows the ports of the two servers behind it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, prefill_port: int, decode_port: int) -> None:
        super().__init__((host, port), Relay)
        self.host, self.prefill_port, self.decode_port = host, prefill_port, decode_port

    def ask(self, port: int, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        """The response of one of the two, its body yet to be read. Raises `OSError`."""
        connection = http.client.HTTPConnection(self.host, port, timeout=TIMEOUT_S)
        connection.request("POST", path, json.dumps(body), HEADERS)
        return connection.getresponse()


class Relay(BaseHTTPRequestHandler):
    """One request: prefill's answer tells decode where the KV cache is."""

    server: Proxy

    def do_POST(self) -> None:
        """Pass on decode's stream, or the error of whichever had one."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        whole = {"max_tokens": 1, "stream": False, "stream_options": None}
        remote = {"do_remote_decode": True, "do_remote_prefill": False}
        try:
            answer = self.server.ask(
                self.server.prefill_port, self.path, {**body, **whole, "kv_transfer_params": remote}
            )
            if answer.status == 200:
                where = where_kv_lies(answer.read())
                answer = self.server.ask(
                    self.server.decode_port, self.path, {**body, "kv_transfer_params": where}
                )
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.send_error(502, str(error))
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
        self.end_headers()  # HTTP/1.0: the end of the connection ends the body
        for line in answer:
            self.wfile.write(line)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


def where_kv_lies(content: bytes) -> dict[str, Any]:
    """What decode must be told, from prefill's answer. Raises `ValueError` where it names no blocks."""
    answer = json.loads(content)
    where = answer.get("kv_transfer_params") if isinstance(answer, dict) else None
    if not isinstance(where, dict) or not where.get("remote_block_ids"):
        raise ValueError(f"prefill handed no KV over: kv_transfer_params={where!r}")
    return where


def main() -> None:
    """Start the two, relay until a signal comes, stop them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", required=True, metavar="COMMAND")
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True, help="of the proxy; the next four are taken too")
    parser.add_argument("--dtype", required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    halves = (cores[:half], cores[half:]) if half else (cores, cores)
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for index, share in enumerate(halves, start=1):
            servers.append(start(options, index, share))
        for index, (server, share) in enumerate(zip(servers, halves, strict=True), start=1):
            wait_until_up(server, options.host, options.port + index)
            keep_on(server.pid, share)
        Proxy(options.host, options.port, options.port + 1, options.port + 2).serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait()


def start(options: argparse.Namespace, index: int, cores: list[int]) -> "subprocess.Popen[bytes]":
    """One vLLM server on these cores."""
    port = options.port + index
    command = f"{options.vllm} serve {shlex.quote(options.model)} --host {options.host} --port {port}"
    rest = [
        "--dtype",
        options.dtype,
        "--max-model-len",
        "8192",
        "--kv-transfer-config",
        json.dumps(CONNECTOR),
    ]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NIXL_SIDE_CHANNEL_HOST": options.host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port + 2),
    }
    return subprocess.Popen(shlex.split(command) + rest, env={**os.environ, **environment})


def wait_until_up(server: "subprocess.Popen[bytes]", host: str, port: int) -> None:
    """Until it says that it is healthy. Raises `SystemExit` where it ends instead."""
    while server.poll() is None:
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(host, port, timeout=5.0)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"the server on port {port} ended with status {server.returncode}")


def keep_on(pid: int, cores: list[int]) -> None:
    """Every thread of a process and of what it started, on these cores; some may end meanwhile."""
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            for thread in one.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, cores)


if __name__ == "__main__":
    main()
