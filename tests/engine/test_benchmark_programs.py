"""The measuring programs notice what they must: wrong counts, other words, servers' errors, broken bytes."""

import json
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import msgspec
import psutil
import pytest

from kvrelay.engine import Engine
from kvrelay.errors import KVRelayError
from kvrelay.outputs import StreamEvent
from kvrelay.types import RequestId, RequestSpec
from kvrelay_kernels.cpu.native import library as native_library
from tiny_engine import write_tiny_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmark_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers

    monkeypatch.setattr(peers, "_busy_percent", lambda: 0.0)  # a busy machine is no reason to wait here


class Completions(BaseHTTPRequestHandler):
    """Answers every prompt with its first words, one piece a token; the server's `fault` goes wrong once."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.fault  # type: ignore[attr-defined]
        if fault == "refuse":
            self.send_error(400, "no such model")
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        count = body["max_tokens"] - (fault == "short")
        word = "other " if fault == "other words" else "same "
        for _ in range(count):
            self._event({"choices": [{"index": 0, "text": word}]})
        if fault == "error":
            self._event({"error": {"message": "out of blocks"}})
        if fault != "no usage":
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
            self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def serve() -> Iterator[Any]:
    """Starts servers with a fault; each call returns an address."""
    servers: list[ThreadingHTTPServer] = []

    def start(fault: str = "") -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
        server.fault = fault  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def run(first: str, second: str) -> Any:
    import peers
    from openai_client import Target

    targets = [Target("kvrelay-x", first, "m"), Target("other", second, "m")]
    cell = peers.Cell.parse("40x6@2")
    rows = peers.run_round(targets, cell, ["x" * 40, "y" * 40, "z" * 40], 0, {})
    return [{**row, "busy_percent": 0.0} for row in rows]


@pytest.mark.parametrize(
    ("fault", "failing"), [("", []), ("short", ["exactly", "same_text"]), ("other words", ["same_text"])]
)
def test_the_gate_of_peers_sees_counts_and_words(serve: Any, fault: str, failing: list[str]) -> None:
    import peers

    gate = peers.gate(run(serve(), serve(fault)), "float32")
    red = [name for name, passed in gate.checks.items() if not passed]
    assert len(red) == len(failing)
    assert all(word in name for word, name in zip(failing, red, strict=True)), red


def test_words_are_compared_over_the_rounds_of_a_cell(serve: Any) -> None:
    """In bfloat16 one request of three may begin with another word, whichever round it is in; two may not."""
    import peers

    same, other = run(serve(), serve()), run(serve(), serve("other words"))
    assert peers.gate([*same, *same, *other], "bfloat16").passed
    assert not peers.gate([*same, *other, *other], "bfloat16").passed


def test_a_busy_machine_fails_the_gate(serve: Any) -> None:
    import peers

    rows = run(serve(), serve())
    rows[0]["busy_percent"] = 50.0
    assert not peers.gate(rows, "float32").passed


def test_a_peer_that_spins_is_stopped_while_others_are_measured(serve: Any, monkeypatch: Any) -> None:
    import openai_client
    import peers
    from openai_client import Target

    states: set[tuple[str, bool]] = set()
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:

        def closed_loop(asked: Target, *rest: Any) -> Any:
            time.sleep(0.1)  # signals take effect when the process next runs
            states.add((asked.name, psutil.Process(process.pid).status() == "stopped"))
            return openai_client.closed_loop(asked, *rest)

        monkeypatch.setattr(peers, "closed_loop", closed_loop)
        targets = [Target("kvrelay-x", serve(), "m"), Target("spinning", serve(), "m")]
        peers.run_round(targets, peers.Cell.parse("40x6@1"), ["x" * 40], 0, {"spinning": process.pid})
        time.sleep(0.1)
        states.add(("after", psutil.Process(process.pid).status() == "stopped"))
        process.kill()
    assert states == {("kvrelay-x", True), ("spinning", False), ("after", False)}


def test_what_was_stopped_goes_on_though_another_has_ended() -> None:
    from servers import stopped

    with ExitStack() as stack:
        first, second = (
            stack.enter_context(subprocess.Popen(["sleep", "60"], start_new_session=True)) for _ in range(2)
        )
        stack.callback(second.kill)

        def measure() -> None:
            with stopped([first.pid, second.pid]):
                first.kill()
                first.wait()
                raise RuntimeError("it was this")

        with pytest.raises(RuntimeError, match="it was this"):
            measure()
        time.sleep(0.1)  # signals take effect when the process next runs
        assert psutil.Process(second.pid).status() != "stopped"


@pytest.mark.parametrize("fault", ["refuse", "error", "no usage"])
def test_a_servers_error_ends_the_measurement(serve: Any, fault: str) -> None:
    from openai_client import ServerError

    with pytest.raises(ServerError):
        run(serve(), serve(fault))


def test_ratios_say_how_many_times_better_ours_is(serve: Any) -> None:
    from peers_report import ratios, summary

    rows = run(serve(), serve())
    for row, speed in zip(rows, (30.0, 10.0), strict=True):
        row.update(tokens_per_s=speed, ttft_ms=100.0 / speed, tpot_ms=1.0, itl_p99_ms=1.0)
    (servers,) = summary(rows).values()
    assert ratios(servers) == {
        ("kvrelay-x", "other"): {
            "tokens_per_s": 3.0,
            "ttft_ms": pytest.approx(3.0),
            "tpot_ms": 1.0,
            "itl_p99_ms": 1.0,
        }
    }


def test_a_run_without_a_whole_cell_leaves_no_record(tmp_path: Path) -> None:
    import argparse

    import peers

    nothing: dict[str, Any] = {"runs": [], "starts_s": {}, "commands": []}
    with pytest.raises(SystemExit, match="no cell"):
        peers.write(argparse.Namespace(dtype="float32"), tmp_path / "peers.json", nothing, [], {})
    assert not list(tmp_path.iterdir())


def test_prompts_have_exactly_their_tokens_and_their_own_beginnings() -> None:
    import peers
    from kvrelay.models.tokenizer import Tokenizer
    from real_model import smollm2_directory

    tokenizer = Tokenizer.from_directory(smollm2_directory())
    texts = peers.prompts(tokenizer, peers.Cell.parse("96x8@3"), "seed")
    assert [len(tokenizer.encode(text)) for text in texts] == [96] * 6
    assert len({text[:16] for text in texts}) == 6
    assert texts == peers.prompts(tokenizer, peers.Cell.parse("96x8@3"), "seed")


def test_transports_deliver_the_senders_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transport

    arguments = ["transport.py", "--rounds", "1", "--pages", "5", "--large-mib", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    transport.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["gate"]["passed"]
    assert {"memcpy", "TCP", "shm", "inproc"} <= record["results"]["medians"].keys()
    assert all(row["seconds"] > 0 for row in record["results"]["rounds"])


def test_a_byte_that_differs_is_seen() -> None:
    import transport

    with ExitStack() as stack:
        pages = transport.Pages("inproc", 4, stack)
        pages.fill(1)
        pages.send([0, 1], [2, 3])
        assert pages.is_whole()
        pages._expected.view(transport.torch.uint8)[0, 0, 2, 0, 0, 0] ^= 1
        assert not pages.is_whole()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_interference_times_streams_under_long_prompts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    import interference

    sizes = ["--streams", "2", "--prompt-tokens", "300", "--prompts", "1", "--quiet-tokens", "2"]
    arguments = ["interference.py", "--model", str(tiny), "--rounds", "1", *sizes, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    interference.main()
    record = last_line(capsys)
    assert record["gate"]["passed"]
    assert (tmp_path / "interference.png").exists()
    for row in record["results"]["rounds"]:
        assert 0 < row["itl_p50_ms"] <= row["itl_p99_ms"]
        assert row["prompt_ttft_ms"] > 0
    rows = record["results"]["rounds"]
    rows[0]["beginnings"][0][0] += 1
    assert not interference._gate(rows).passed


def test_second_turns_are_held_against_one_that_kept_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import second_turn

    sizes = ["--prompt-tokens", "200", "--output-tokens", "4", "--dtype", "float32"]
    arguments = ["second_turn.py", "--model", str(tiny), *sizes, "--cases", "pages", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    second_turn.main()
    record = last_line(capsys)
    assert record["gate"]["passed"], record["gate"]
    assert list(record["results"]) == ["nothing", "pages"]
    assert json.loads((tmp_path / "second_turn.json").read_text()) == record


def test_a_bare_server_ends_the_connection_of_a_request_that_fails() -> None:
    from bare_server import start_bare_server

    class Failing:
        def prepare(self, *arguments: Any) -> None:
            return

        def submit(self, prepared: None, on_event: Any) -> None:
            on_event(StreamEvent(request_id=RequestId("r"), error=KVRelayError("it failed")))

    port = start_bare_server(cast(Engine, Failing()))
    content = b'{"prompt": "x", "max_tokens": 1}'
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(content) + content)
        assert connection.recv(100) == b""


@pytest.mark.slow
def test_the_map_compares_both_modes_at_each_length_and_load(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import disaggregation_map

    sizes = ["--lengths", "64", "130", "--loads", "0.5", "--requests", "2", "--output-tokens", "4"]
    arguments = [
        "disaggregation_map.py",
        "--model",
        str(tiny),
        "--rounds",
        "1",
        *sizes,
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    disaggregation_map.main()
    record = last_line(capsys)
    assert record["gate"]["passed"]
    assert [row["length"] for row in record["results"]["map"]] == [64, 130]
    rows = record["results"]["rounds"]
    rows[0]["tokens"][0] = rows[0]["tokens"][0][:-1]
    assert not any(disaggregation_map._gate(rows, 4).checks.values())


def test_traces_become_prompts_that_share_what_the_trace_says(tmp_path: Path) -> None:
    import replay

    rows = [
        {"timestamp": 500, "input_length": 1100, "output_length": 20, "hash_ids": [7, 8, 9]},
        {"timestamp": 2500, "input_length": 1100, "output_length": 20, "hash_ids": [7, 8, 10]},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    first, second = replay.read_trace(trace)
    assert (first.at_s, second.at_s) == (0.0, 2.0)
    a, b = (replay.prompt_of(arrival, index, 0.5) for index, arrival in enumerate((first, second)))
    assert (len(a), len(b)) == (550, 550)
    assert a[:512] == b[:512]
    assert a[512:] != b[512:]
    csv = tmp_path / "trace.csv"
    csv.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.4799600,3180,8\n"
    )
    first, second = replay.read_trace(csv)
    assert (second.at_s, second.input_tokens, second.output_tokens) == (pytest.approx(0.5), 3180, 8)
    csv.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n")
    with pytest.raises(SystemExit, match="row 1"):
        list(replay.read_trace(csv))


def test_a_replay_counts_failures_against_goodput(serve: Any) -> None:
    import replay
    from openai_client import Target

    arrivals = [replay.Arrival(0.0, 8, 4), replay.Arrival(0.05, 8, 4)]
    outcomes = replay.replay(Target("other", serve(), "m"), arrivals, 1.0, 1.0)
    figures = replay.figures([*outcomes, "ServerError: full"], 10_000.0, 10_000.0)
    assert (figures["requests"], figures["failed"], figures["errors"]) == (3, 1, ["ServerError: full"])
    assert figures["kept_slo"] == pytest.approx(2 / 3)
    assert replay.figures(outcomes, 0.0, 0.0)["kept_slo"] == 0.0


@pytest.mark.parametrize("impl", ["native", "torch"])
def test_a_decode_steps_overhead_is_all_but_the_model(
    tiny_directory: Path, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors and tables are made in `Runner.logits`, around the model: they count as overhead."""
    import decode_step

    if impl == "native" and native_library.instruction_set() is None:
        pytest.skip(native_library.HOW_TO_BUILD)
    request = decode_step._request

    def small(*arguments: Any) -> RequestSpec:
        found = request(*arguments)
        return msgspec.structs.replace(found, token_ids=tuple(token % 256 for token in found.token_ids))

    monkeypatch.setattr(decode_step, "_request", small)
    side = decode_step.Side(
        impl, "float32", Namespace(directory=tiny_directory, threads=1, context=64, steps=3)
    )
    logits = side.parts.runner.logits

    def slow(batch: list[Any]) -> Any:
        time.sleep(0.05)
        return logits(batch)

    with closing(side.parts):
        monkeypatch.setattr(side.parts.runner, "logits", slow)
        step_s, model_s, tokens = side.run(2, 1.0)
    assert 0 < model_s < step_s - 0.05
    assert [len(row) for row in tokens] == [4, 4]
