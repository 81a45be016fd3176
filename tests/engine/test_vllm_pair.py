"""The proxy before vLLM's pair. Prefill is asked for one token, and decode is told where the KV is."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NOWHERE = [None, {}, {"remote_block_ids": []}, "somewhere"]
WHERE = {"do_remote_prefill": True, "remote_block_ids": [[4, 5]]}


class Vllm(BaseHTTPRequestHandler):
    """One of the two: keeps what it was asked, and answers as vLLM's role does."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)  # type: ignore[attr-defined]
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()
        if body["stream"]:
            for text in ("one", "two"):
                self.wfile.write(b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n")
            usage = {"prompt_tokens": 3, "completion_tokens": 2}
            self.wfile.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        else:
            self.wfile.write(json.dumps(self.server.answer).encode())  # type: ignore[attr-defined]

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any, Any]]:
    """Proxy, prefill, decode: running."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from vllm_pair import Proxy

    sides: list[Any] = [ThreadingHTTPServer(("127.0.0.1", 0), Vllm) for _ in range(2)]
    proxy = Proxy("127.0.0.1", 0, *(side.server_port for side in sides))
    for server in (*sides, proxy):
        server.asked, server.status, server.answer = [], 200, {"kv_transfer_params": WHERE}
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield proxy, *sides
    for server in (proxy, *sides):
        server.shutdown()
        server.server_close()


def test_the_pair_hands_the_cache_over(pair: tuple[Any, Any, Any]) -> None:
    from openai_client import Target, complete

    proxy, prefill, decode = pair
    exchange = complete(Target("pair", f"http://127.0.0.1:{proxy.server_port}", "m"), "a b c", 2)
    assert (exchange.text, exchange.num_tokens) == ("onetwo", 2)
    (first,), (second,) = prefill.asked, decode.asked
    assert (first["max_tokens"], first["stream"], first["prompt"]) == (1, False, "a b c")
    assert first["kv_transfer_params"]["do_remote_decode"]
    assert (second["max_tokens"], second["stream"], second["kv_transfer_params"]) == (2, True, WHERE)


@pytest.mark.parametrize("answer", [*({"kv_transfer_params": each} for each in NOWHERE), {}, [], None])
def test_decode_is_not_asked_where_no_cache_was_handed_over(pair: tuple[Any, Any, Any], answer: Any) -> None:
    """It would compute the prompt itself, and nobody would see it."""
    from openai_client import ServerError, Target, complete

    pair[1].answer = answer
    with pytest.raises(ServerError, match="answered 502"):
        complete(Target("pair", f"http://127.0.0.1:{pair[0].server_port}", "m"), "a b c", 2)
    assert pair[2].asked == []


@pytest.mark.parametrize("side", [1, 2])
def test_an_error_of_either_side_is_passed_on(pair: tuple[Any, Any, Any], side: int) -> None:
    from openai_client import ServerError, Target, complete

    pair[side].status = 400
    with pytest.raises(ServerError, match="answered 400"):
        complete(Target("pair", f"http://127.0.0.1:{pair[0].server_port}", "m"), "a b c", 2)
    assert len(pair[2].asked) == side - 1


def test_a_side_that_is_not_up_is_an_error(pair: tuple[Any, Any, Any]) -> None:
    from openai_client import ServerError, Target, complete

    pair[1].shutdown()
    pair[1].server_close()
    with pytest.raises(ServerError, match="answered 502"):
        complete(Target("pair", f"http://127.0.0.1:{pair[0].server_port}", "m"), "a b c", 2)


def test_every_thread_is_kept_on_its_cores(pair: tuple[Any, Any, Any]) -> None:
    from vllm_pair import keep_on

    cores = os.sched_getaffinity(0)
    code = "import threading; threading.Thread(target=input).start(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        keep_on(process.pid, [max(cores)])
        threads = [int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()]
        assert len(threads) == 2
        assert all(os.sched_getaffinity(thread) == {max(cores)} for thread in threads)
        process.communicate(b"a\nb\n")


def test_a_thread_that_ends_meanwhile_is_left_out(pair: tuple[Any, Any, Any], monkeypatch: Any) -> None:
    import psutil

    from vllm_pair import keep_on

    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    last = max(os.sched_getaffinity(0))
    with subprocess.Popen(["sleep", "60"]) as process:
        threads = [SimpleNamespace(id=number) for number in (ended.native_id, process.pid)]
        monkeypatch.setattr(psutil.Process, "threads", lambda process: threads)
        keep_on(process.pid, [last])
        assert os.sched_getaffinity(process.pid) == {last}
        process.kill()


def test_the_first_server_is_ended_where_the_second_does_not_start(
    pair: tuple[Any, Any, Any], monkeypatch: Any
) -> None:
    import vllm_pair

    begun: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any) -> Any:
        if begun:
            raise OSError("no memory")
        begun.append(subprocess.Popen(["sleep", "60"]))
        return begun[0]

    monkeypatch.setattr(vllm_pair, "start", start)
    monkeypatch.setattr(signal, "signal", lambda *of: None)  # this process keeps its own
    asked = "vllm_pair.py --vllm v --model m --host 127.0.0.1 --port 1 --dtype float32"
    monkeypatch.setattr(sys, "argv", asked.split())
    with pytest.raises(OSError, match="no memory"):
        vllm_pair.main()
    assert begun[0].returncode == -signal.SIGTERM


def test_a_server_that_ends_is_not_waited_for(pair: tuple[Any, Any, Any]) -> None:
    from vllm_pair import wait_until_up

    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match="status 3"):
        wait_until_up(process, "127.0.0.1", 9)
