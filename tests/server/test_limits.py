"""Who may use the server and how much they may bring: keys, addresses, sizes, slow and vanishing clients."""

import base64
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from kvrelay.errors import InvalidConfig
from kvrelay.server.run import allow_files
from kvrelay.server_config import ServerConfig
from tiny_server import Served, tiny_server, wait_for_blocks

LIMITS = {
    "api_key": "s3cret-ü",
    "max_body_bytes": 50_000,
    "max_headers": 20,
    "max_header_bytes": 4096,
    "header_timeout_s": 1.0,
    "body_timeout_s": 1.0,
}
KEY = {"Authorization": "Bearer s3cret-ü".encode()}
HI = {"prompt": "hi", "max_tokens": 2}


@pytest.fixture(scope="module")
def guarded(tiny_directory: Path) -> Iterator[Served]:
    with tiny_server(tiny_directory, LIMITS) as served:
        yield served


@pytest.fixture
def client(guarded: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=30) as client:
        yield client


def test_every_route_but_health_needs_the_key(client: httpx.Client) -> None:
    assert client.get("/health").status_code == 200
    document = client.get("/openapi.json", headers=KEY).json()
    paths = document["paths"]
    assert len(paths) >= 14
    assert (document["security"], paths["/health"]["get"]["security"]) == ([{"key": []}], [])
    for path, operations in [*paths.items(), ("/openapi.json", {"get": 0}), ("/nowhere", {"get": 0})]:
        for method in operations:
            if path != "/health":
                answer = client.request(method, path)
                assert answer.status_code == 401, path
                assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "given", ["Bearer s3cret", "Bearer s3cret-ü ü", "Bearer", "Token s3cret-ü", "Basic !!", "x"]
)
def test_a_wrong_key_opens_nothing(client: httpx.Client, given: str) -> None:
    answer = client.get("/v1/models", headers={"Authorization": given.encode()})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_key_opens_for_clients_and_for_browsers(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers=KEY).status_code == 200
    assert client.get("/").headers["www-authenticate"].startswith("Basic")
    password = base64.b64encode("anyone:s3cret-ü".encode()).decode()
    assert client.get("/", headers={"Authorization": f"Basic {password}"}).status_code == 200


def test_only_this_machine_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVRELAY_API_KEY", raising=False)
    for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1"):
        assert ServerConfig(host=host).api_key is None
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):
        with pytest.raises(InvalidConfig, match="give an api_key"):
            ServerConfig(host=host)
    assert ServerConfig(host="0.0.0.0", api_key="x").host == "0.0.0.0"
    monkeypatch.setenv("KVRELAY_API_KEY", "from outside")
    assert ServerConfig(host="0.0.0.0").api_key == "from outside"
    with pytest.raises(InvalidConfig, match="api_key=''"):
        ServerConfig(api_key="")


def test_a_body_is_refused_before_it_is_read(client: httpx.Client) -> None:
    told = client.post("/v1/completions", headers=KEY, json={"prompt": "x" * 60_000})
    assert told.status_code == 413
    assert "at most 50000" in told.json()["error"]["message"]
    untold = client.post(
        "/v1/completions", headers=KEY | {"content-type": "application/json"}, content=iter([b"x" * 60_000])
    )
    assert untold.status_code == 413
    assert "more than 50000 bytes" in untold.json()["error"]["message"]
    assert client.post("/v1/completions", headers=KEY, json=HI).status_code == 200


def test_many_headers_are_refused(client: httpx.Client) -> None:
    many = client.get("/v1/models", headers={**KEY, **{f"x-{n}": "y" for n in range(30)}})
    assert many.status_code == 431
    assert "at most 20" in many.json()["error"]["message"]


def raw(guarded: Served, data: bytes, timeout_s: float = 5.0) -> bytes:
    """Everything the server says to these bytes until it closes."""
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=timeout_s) as connection:
        connection.sendall(data)
        said = b""
        try:
            while piece := connection.recv(65536):
                said += piece
        except ConnectionResetError:
            pass
        return said


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nx: " + b"y" * 8192,
        b"GET /" + b"y" * 8192,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 2000,
    ],
    ids=["one header", "the path", "many headers"],
)
def test_a_head_without_end_is_cut_off(guarded: Served, head: bytes) -> None:
    said = raw(guarded, head)
    assert said.startswith(b"HTTP/1.1 431")
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["message"].endswith("more than 4096 bytes")


def chunked(key: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\nauthorization: Bearer " + key
    body = json.dumps(HI).encode()
    return head + b"\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n" % (len(body), body)


@pytest.mark.parametrize("trailer", [b"x: " + b"y" * 1000 + b"\r\n", b"x" * 1000], ids=["many", "one"])
@pytest.mark.parametrize("key", [LIMITS["api_key"].encode(), b"wrong"], ids=["right", "wrong"])
def test_trailers_without_end_are_cut_off(guarded: Served, key: bytes, trailer: bytes) -> None:
    """By their bytes: the body's time and the linger's are not waited for."""
    num_sent, begin_s, said = 0, time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=5) as connection:
        connection.sendall(chunked(key))
        with suppress(ConnectionError):
            while num_sent < 64_000_000:
                num_sent += connection.send(trailer * 3)
                time.sleep(0.002)  # the server reads meanwhile
        with suppress(ConnectionError):
            said = connection.recv(65536)
    assert num_sent < 64_000
    assert time.monotonic() - begin_s < 0.9
    assert not said or said.startswith(b"HTTP/1.1 431" if key != b"wrong" else b"HTTP/1.1 401")


def test_a_trailer_is_no_header(guarded: Served) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=5) as connection:
        connection.sendall(chunked(LIMITS["api_key"].encode()) + b"x: y\r\n" * 50 + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_empty_lines_do_not_hold_a_connection(guarded: Served) -> None:
    """Any byte ends the wait of a connection that is kept alive: another begins."""
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(0.1)
        connection.sendall(b"\r\n")
        assert connection.recv(65536) == b"", "closed after header_timeout_s"


def test_what_is_not_http_gets_the_error_object_too(guarded: Served) -> None:
    said = raw(guarded, b"\x16\x03\x01 hello\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 400")
    assert "message" in json.loads(said.partition(b"\r\n\r\n")[2])["error"]


def test_slow_clients_hold_nobody_up_and_are_let_go(guarded: Served, client: httpx.Client) -> None:
    """Some never finish their head, some their body; others are served meanwhile."""
    key = b"authorization: Bearer " + LIMITS["api_key"].encode() + b"\r\n"
    starts = [b"GET / HT", b"POST /v1/completions HTTP/1.1\r\n" + key]
    starts.append(starts[1] + b"content-type: application/json\r\ncontent-length: 10\r\n\r\n{")
    slow = [threading.Thread(target=raw, args=(guarded, start), daemon=True) for start in starts * 10]
    for thread in slow:
        thread.start()
    begin_s = time.monotonic()
    assert client.post("/v1/completions", headers=KEY, json=HI).status_code == 200
    assert time.monotonic() - begin_s < 1.0
    for thread in slow:
        thread.join(4)
        assert not thread.is_alive(), "the server had a second for each"
    assert raw(guarded, starts[2]).startswith(b"HTTP/1.1 408")


def test_each_request_of_a_connection_has_the_whole_limit_and_a_clock_of_its_own(guarded: Served) -> None:
    head = b"GET /health HTTP/1.1\r\nx: " + b"y" * 1500 + b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=5) as connection:
        for _ in range(8):  # more than one may have, all together; in two pieces, so that a part is seen
            connection.sendall(head[:1000])
            time.sleep(0.05)
            connection.sendall(head[1000:])
            said = b""
            while b"}" not in said:
                said += connection.recv(65536)
            assert said.startswith(b"HTTP/1.1 200"), said
        connection.sendall(head[:1000])
        begin_s = time.monotonic()
        assert connection.recv(65536) == b"", "closed"
        assert time.monotonic() - begin_s < 4


def test_a_reader_that_stops_reading_is_no_burden(guarded: Served, client: httpx.Client) -> None:
    """It takes a stream and never reads: others go on, and its request ends when it goes."""
    body = json.dumps(
        {"prompt": "x", "max_tokens": 1000, "stream": True, "ignore_eos": True, "n": 4}
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\nauthorization: Bearer "
    head += LIMITS["api_key"].encode() + b"\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", guarded.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sendall(head + body)
        connection.recv(10)
        assert client.post("/v1/completions", headers=KEY, json=HI).status_code == 200
    wait_for_blocks(guarded.engine)


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_system_that_allows_no_more_files_is_no_hindrance(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise error("not so many")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (512, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    allow_files()


def test_a_thousand_streams_stand_open(tiny_directory: Path) -> None:
    """One sequence runs at a time: the others wait in their streams. None is lost, and the server answers."""
    count = 1000
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, allowed), most))  # the server takes what it may have
    body = json.dumps({"prompt": "x", "max_tokens": 1000, "stream": True, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with tiny_server(tiny_directory, max_num_seqs=1, verify_kv=False) as served, ExitStack() as stack:
        connections = []
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", served.port), timeout=10)
            connections.append(stack.enter_context(connection))
            connection.sendall(head % len(body) + body)

        def taken() -> tuple[int, int]:
            ended = served.engine.report().num_requests
            assert ended["failed"] == ended["aborted"] == 0
            return len(served.engine.in_flight()), ended["finished"]

        until(lambda: sum(taken()) == count)
        for _ in range(6):  # half a second apart
            begin_s = time.monotonic()
            assert httpx.get(f"{served.url}/v1/models", timeout=10).status_code == 200
            assert time.monotonic() - begin_s < 3.0
            time.sleep(0.5)
        in_flight, finished = taken()
        assert in_flight + finished == count
        assert in_flight > 0.9 * count, "they stand open, they do not run"
        num_begun = sum(has_begun(connection) for connection in connections)
        assert num_begun >= max(1, finished)
        stack.close()
        until(lambda: not served.engine.in_flight())
        wait_for_blocks(served.engine)
        assert httpx.post(f"{served.url}/v1/completions", json=HI, timeout=30).status_code == 200


def has_begun(connection: socket.socket) -> bool:
    """Whether a stream comes over the connection, or nothing yet: it must not be closed, or refused."""
    connection.setblocking(False)
    try:
        said = connection.recv(12, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    assert said == b"HTTP/1.1 200"
    return True


def until(is_so: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
