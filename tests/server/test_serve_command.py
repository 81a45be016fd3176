"""`kvrelay serve` as a process: what it says, how it ends, why it does not start; and its settings."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from kvrelay.config import EngineConfig
from kvrelay.errors import InvalidConfig
from kvrelay.server.run import serve
from kvrelay.server_config import ServerConfig
from kvrelay.settings import combine, parse_pair, read_file

LONG = {"prompt": "hello", "max_tokens": 900, "ignore_eos": True, "stream": True}


@contextmanager
def process(directory: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and its URL, from the line it prints."""
    command = [sys.executable, "-m", "kvrelay", "serve", "--model", str(directory), "--port", "0"]
    command += ["--set", "num_kv_blocks=64", "--set", "threads_per_worker=1", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(r"is served at (http://\S+)", line)
        assert found, line + server.stderr.read()
        yield server, found.group(1)
    finally:
        server.kill()
        server.wait()


def test_it_takes_connections_when_it_says_so(tiny_directory: Path, no_leftovers: None) -> None:
    said = []

    def say(line: str) -> None:
        said.append(line)
        socket.create_connection(("127.0.0.1", int(line.rpartition(":")[2])), timeout=5).close()
        signal.raise_signal(signal.SIGTERM)

    engine = EngineConfig.of(model=str(tiny_directory), transport="inproc", num_kv_blocks=64)
    serve(engine, ServerConfig(port=0), say)
    assert len(said) == 1


def test_a_stop_lets_streams_finish_takes_no_more_and_leaves_nothing(
    tiny_directory: Path, no_leftovers: None
) -> None:
    with process(tiny_directory, "--served-model-name", "tiny") as (server, url):
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        last = json.loads(rest[-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        assert server.wait(20) == 0


def test_what_does_not_finish_in_time_is_told_so(tiny_directory: Path, no_leftovers: None) -> None:
    """One runs and streams; one waits for its turn, without a token yet."""
    slow = ("--set", "server.drain_timeout_s=1", "--set", "max_num_seqs=1")
    many, mine = {**LONG, "n": 64}, {"x-request-id": "mine"}
    with process(tiny_directory, *slow) as (server, url), ThreadPoolExecutor() as threads:
        completions = f"{url}/v1/completions"
        with httpx.stream("POST", completions, json=many, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            whole = {**many, "stream": False}
            waiting = threads.submit(httpx.post, completions, json=whole, headers=mine, timeout=60)
            while httpx.get(f"{url}/v1/kvrelay/report").json()["num_requests"]["running"] <= 64:
                time.sleep(0.05)
            server.send_signal(signal.SIGINT)
            begin_s = time.monotonic()
            *_, last, done = [line for line in lines if line]
        assert server.wait(20) == 0
        assert time.monotonic() - begin_s < 15
        refused = waiting.result(5)
    assert (refused.status_code, refused.headers["x-request-id"]) == (503, "mine")
    assert done == "data: [DONE]"
    for document in (refused.text, last.removeprefix("data: ")):
        error = json.loads(document)["error"]
        assert error["code"] == "shutting_down"
        assert error["message"] == "the server shut down, and waited 1 s for it"


def test_a_second_signal_does_not_wait(tiny_directory: Path, no_leftovers: None) -> None:
    with process(tiny_directory, "--set", "max_num_seqs=1") as (server, url):
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "n": 64}, timeout=60) as stream:
            pieces = stream.iter_raw()  # held: a dropped iterator closes the stream
            next(pieces)
            server.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                server.wait(1)
            begin_s = time.monotonic()
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
        assert time.monotonic() - begin_s < 10, "it had thirty seconds to drain"


def test_a_body_on_its_way_does_not_hold_the_server(tiny_directory: Path, no_leftovers: None) -> None:
    with process(tiny_directory) as (server, url):
        address = urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b'{"prompt":')
        assert httpx.get(f"{url}/health").status_code == 200  # by then it is being read
        begin_s = time.monotonic()
        server.send_signal(signal.SIGTERM)
        answer = connection.getresponse()
        assert answer.status == 503
        assert json.loads(answer.read())["error"]["code"] == "shutting_down"
        connection.close()
        assert server.wait(20) == 0
        assert time.monotonic() - begin_s < 10, "it had thirty seconds to drain"


def test_who_looks_at_the_page_does_not_hold_the_server(tiny_directory: Path, no_leftovers: None) -> None:
    with (
        process(tiny_directory) as (server, url),
        httpx.stream("GET", f"{url}/v1/kvrelay/live", timeout=60) as stream,
    ):
        pieces = stream.iter_raw()
        next(pieces)
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "InvalidConfig: host='0.0.0.0': other machines"),
        (["--host", "192.0.2.1", "--api-key", "x"], "host='192.0.2.1', port=0: cannot listen there"),
        (["--model", "/nowhere"], "UnknownName: unknown model '/nowhere'"),
        (["--set", "server.nothing=1"], "nothing: there is no such setting"),
        (["--set", "other.port=1"], "there is no table 'other'"),
        (["--config", "/nowhere.toml"], "--config /nowhere.toml: No such file"),
        (["--policy", "nobodys"], "UnknownName: policy='nobodys'"),
        (["--max-model-len", "5000"], "max_model_len=5000: the model has 1024 positions"),
        (["--attention", "best"], "UnknownName: attention='best'"),
        (["--kv-handoff", "sparse"], "kv_handoff='sparse': with attention='dense' every token reads all KV"),
        (["--rope-scaling", "yarn"], "rope_scaling='yarn'"),
    ],
)
def test_a_start_that_fails_says_why(tiny_directory: Path, options: list[str], reason: str) -> None:
    command = [sys.executable, "-m", "kvrelay", "serve", "--model", str(tiny_directory), "--port", "0"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_found_before_the_model_is_loaded(tiny_directory: Path) -> None:
    with process(tiny_directory) as (_, url):
        port = url.rpartition(":")[2]
        command = [sys.executable, "-m", "kvrelay", "serve", "--model", str(tiny_directory), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "Address already in use" in done.stderr) == (1, True)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_options_go_before_pairs_and_pairs_before_the_file(tmp_path: Path) -> None:
    file = read_file(
        write(
            tmp_path / "engine.toml",
            'model = "from-file"\ndecode_workers = 2\nmax_num_seqs = 3\n[server]\nport = 1\nmax_headers = 2\n'
            '[[workers]]\nrole = "prefill"\n[[workers]]\nrole = "decode"\nthreads = 2\n',
        )
    )
    pairs = ["decode_workers=3", "max_num_seqs=4", "server.port=5", "transport=inproc"]
    engine, server = combine(file, pairs, {"max_num_seqs": 6, "policy": None}, {"port": 7, "host": None})
    assert (engine.model, engine.decode_workers, engine.max_num_seqs) == ("from-file", 3, 6)
    assert (engine.transport, engine.policy) == ("inproc", "least_loaded")
    assert (server.port, server.max_headers, server.host) == (7, 2, "127.0.0.1")
    assert engine.workers is not None
    assert [worker.role for worker in engine.workers] == ["prefill", "decode"]
    for measured in ({"local_prefill_tokens": "auto"}, []), ({}, ["local_prefill_tokens=auto"]):
        assert combine({"model": "m"} | measured[0], measured[1], {}, {})[0].local_prefill_tokens == "auto"
    assert engine.max_queued_requests == 1024, "a server's queue is bounded unless told otherwise"
    assert combine({"model": "m", "max_queued_requests": 5}, [], {}, {})[0].max_queued_requests == 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model = ", "engine.toml: Invalid value"),
        ("decode_workers = 2", "model: missing"),
        ('model = "m"\nserver = 3', "\\[server\\]: expected a table"),
        ('model = "m"\n[server]\nport = "x"', "port='x'"),
        ('model = "m"\nlocal_prefill_tokens = "some"', "local_prefill_tokens='some'"),
        ('model = "m"\nlocal_prefill_tokens = -1', "local_prefill_tokens=-1: expected at least 0"),
        ('model = "m"\nno_such = 1', "no_such: there is no such setting"),
        ('model = "m"\n[server]\nport = 70000', "port=70000: expected 0 to 65535"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InvalidConfig, match=reason):
        combine(read_file(write(tmp_path / "engine.toml", text)), [], {}, {})


@pytest.mark.parametrize(("pair", "value"), [("a=1", 1), ("a=x=y", "x=y"), ("a=null", None), ('a="1"', "1")])
def test_pairs_are_json_where_they_can_be(pair: str, value: Any) -> None:
    assert parse_pair(pair) == ("a", value)
    with pytest.raises(InvalidConfig, match="expected NAME=VALUE"):
        parse_pair("a")
