"""Every route as a bare HTTP client sees it: documents, statuses, headers, and one shape for every error."""

import asyncio
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from kvrelay.engine import Prepared
from kvrelay.sampling_params import MAX_LOGPROBS
from kvrelay.server import live
from kvrelay.server.responses import ErrorResponse
from kvrelay.types import RequestId
from kvrelay.version import __version__
from tiny_server import Served, tiny_server

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def assert_is_error(answer: httpx.Response, status: int, part: str, param: str | None = None) -> None:
    assert answer.status_code == status, answer.text
    error = msgspec.json.decode(answer.content, type=ErrorResponse).error
    assert part in error.message
    assert error.param == param
    assert answer.headers["content-type"] == "application/json"


def test_the_state_is_told(client: httpx.Client) -> None:
    for path in ("/health", "/ready"):
        assert client.get(path).json() == {"status": "ok", "reason": None}
    assert client.get("/version").json() == {"version": __version__}
    workers = client.get("/v1/kvrelay/workers").json()["workers"]
    assert {worker["role"] for worker in workers} == {"prefill", "decode"}
    assert client.get("/v1/kvrelay/report").json()["workers"][0]["num_blocks"] == 64


def test_metrics_are_prometheus_text_and_count_what_was_served(client: httpx.Client) -> None:
    def generated() -> float:
        text = client.get("/metrics").text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        return families["kvrelay:generation_tokens"].samples[0].value

    before = generated()
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 7, "ignore_eos": True})
    assert generated() == before + 7
    head = client.head("/metrics")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/plain")


def test_tokens_and_text_come_back(client: httpx.Client, served: Served) -> None:
    text = "hello, wörld"
    tokens = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert tokens["tokens"] == served.engine.tokenizer.encode(text)
    assert tokens["count"] == len(tokens["tokens"]) == len(text.encode())
    assert tokens["max_model_len"] == 1024
    assert tokens["token_strs"][:2] == ["h", "e"]
    assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    chat = client.post("/tokenize", json={"messages": HI}).json()
    assert chat["tokens"] == served.engine.tokenizer.encode("<|user|>hi\n<|assistant|>")
    much = {"messages": [{"role": "user", "content": "x" * 200_000}]}
    assert_is_error(client.post("/tokenize", json=much), 400, "messages: 2000", "messages")
    assert_is_error(client.post("/tokenize", json={}), 400, "exactly one of prompt and messages", "prompt")
    assert_is_error(
        client.post("/detokenize", json={"tokens": [258]}), 400, "258 is not in 0 to 257", "tokens"
    )


@pytest.mark.parametrize(
    ("path", "body", "part", "param"),
    [
        ("completions", {}, "missing required field `prompt`", "prompt"),
        ("completions", {"prompt": 3}, "Expected `str | array`", "prompt"),
        ("completions", {"prompt": []}, "length >= 1", "prompt"),
        ("completions", {"prompt": ""}, "at least one token", "prompt"),
        ("completions", {"prompt": [[]]}, "at least one token", "prompt"),
        ("completions", {"prompt": [1, "a"]}, "got a mixture", "prompt"),
        ("completions", {"prompt": [258]}, "258 is not in 0 to 257", "prompt"),
        ("completions", {"prompt": ["x"] * 1025}, "1025 prompts x n; at most 1024", "n"),
        ("completions", {"prompt": ["x"] * 9, "n": 128}, "9 prompts x n; at most 1024", "n"),
        ("completions", {"prompt": "x", "n": 129}, "<= 128", "n"),
        ("completions", {"prompt": "x", "best_of": 2}, "<= 1", "best_of"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "echo=true", "max_tokens"),
        ("completions", {"prompt": "x", "max_tokens": 1024}, "makes 1025", "max_tokens"),
        ("completions", {"prompt": "x", "max_tokens": -1}, ">= 0", "max_tokens"),
        ("completions", {"prompt": "x", "max_tokens": "3"}, "got `str`", "max_tokens"),
        ("completions", {"prompt": "x", "min_tokens": 17}, "0 to max_tokens=16", "min_tokens"),
        ("completions", {"prompt": "x", "temperature": -0.1}, ">= 0.0", "temperature"),
        ("completions", {"prompt": "x", "top_p": 0}, "> 0.0", "top_p"),
        ("completions", {"prompt": "x", "logprobs": MAX_LOGPROBS + 1}, "<= 20", "logprobs"),
        ("completions", {"prompt": "x", "stop": ["a"] * 17}, "at most 16 strings", "stop"),
        ("completions", {"prompt": "x", "stop": ""}, "at most 16 strings of 1 to", "stop"),
        ("completions", {"prompt": "x", "logit_bias": {"300": 1}}, "300 is not in 0 to 257", "logit_bias"),
        ("completions", {"prompt": "x", "logit_bias": {"3": 101}}, "from -100 to 100", "logit_bias"),
        ("completions", {"prompt": "x", "logit_bias": {"a": 1}}, "Expected `int`", "logit_bias"),
        ("completions", {"prompt": "x", "stream_options": {}}, "needs stream=true", "stream_options"),
        ("completions", {"prompt": "x", "suffix": "y"}, "fill in the middle", "suffix"),
        ("completions", {"prompt": "x", "guided_regex": "a+"}, "not built", "guided_regex"),
        ("completions", {"prompt": "x", "bad_words": ["a"]}, "not built", "bad_words"),
        ("completions", {"prompt": "x", "allowed_token_ids": []}, "not built", "allowed_token_ids"),
        ("completions", {"prompt": "x", "prompt_logprobs": 0}, "echo and logprobs", "prompt_logprobs"),
        ("completions", {"prompt": "x", "return_token_ids": True}, "/tokenize", "return_token_ids"),
        ("chat/completions", {"messages": HI, "function_call": {"name": "f"}}, "not built", "function_call"),
        ("completions", {"prompt": "x" * 200_000}, "characters; max_model_len=1024 holds", "prompt"),
        ("chat/completions", {"messages": [{"content": "x"}]}, "field `role`", "messages[0].role"),
        ("chat/completions", {"messages": HI, "echo": True}, "its message only", "echo"),
        ("completions", {"prompt": "x", "seed": -(2**63) - 1}, ">= -9223372036854775808", "seed"),
        ("chat/completions", {"messages": []}, "length >= 1", "messages"),
        ("chat/completions", {"messages": HI, "tools": [{}]}, "not built", "tools"),
        ("chat/completions", {"messages": HI, "chat_template": "{{ 1 }}"}, "not run", "chat_template"),
        ("chat/completions", {"messages": HI, "top_logprobs": 2}, "needs logprobs=true", "top_logprobs"),
        ("chat/completions", {"messages": HI, "response_format": {"type": "json_object"}}, "only", None),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "only text is read",
            "messages[0].content",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    client: httpx.Client, path: str, body: dict[str, Any], part: str, param: str | None
) -> None:
    answer = client.post(f"/v1/{path}", json=body)
    given = param if param is not None else answer.json()["error"]["param"]
    assert_is_error(answer, 400, part, given)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": [3] * 1024}, "prompt"),
        ("completions", {"prompt": "x" * 1024}, "prompt"),
        ("completions", {"prompt": "x" * 200_000}, "prompt"),
        ("completions", {"prompt": "x", "max_tokens": 1024}, "max_tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 1024}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 200_000}]}, "messages"),
    ],
)
def test_what_is_too_long_for_the_context_has_openais_code(
    client: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    answer = client.post(f"/v1/{path}", json=body)
    assert_is_error(answer, 400, "max_model_len=1024", param)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"chat_template": "{{ 1 }}"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"continue_final_message": True},
    ],
)
def test_tokenize_refuses_what_would_change_the_text(client: httpx.Client, field: dict[str, Any]) -> None:
    answer = client.post("/tokenize", json={"messages": HI, **field})
    assert_is_error(answer, 400, "", next(iter(field)))


def test_negative_seeds_are_seeds_and_minus_one_is_none(client: httpx.Client) -> None:
    def texts(seed: int) -> list[str]:
        body = {"prompt": "x", "seed": seed, "n": 3, "max_tokens": 8, "ignore_eos": True}
        return [choice["text"] for choice in client.post("/v1/completions", json=body).json()["choices"]]

    assert texts(-3) == texts(-3)
    assert len(set(texts(-3))) == 3
    assert texts(-(2**63)) == texts(-(2**63))
    assert texts(-1) != texts(-1)


@pytest.mark.parametrize("stream", [False, True])
def test_usage_tells_what_was_cached(client: httpx.Client, stream: bool) -> None:
    """Two prompts of 150 and of 20 tokens, two choices each: two blocks of the first were there."""
    body: dict[str, Any] = {"prompt": ["c" * 150, "d" * 20], "n": 2, "max_tokens": 1}
    client.post("/v1/completions", json=body)
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    text = client.post("/v1/completions", json=body).text
    usage = json.loads(text.split("data: ")[-2] if stream else text)["usage"]
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (170, {"cached_tokens": 128})


@pytest.mark.parametrize(("path", "prefix"), [("completions", "cmpl"), ("chat/completions", "chatcmpl")])
def test_one_name_leads_from_the_header_to_the_page(
    client: httpx.Client, served: Served, path: str, prefix: str
) -> None:
    body = {"prompt": "x", "messages": HI, "max_tokens": 2, "n": 2}
    for headers in ({"x-request-id": "mine 1"}, {"x-request-id": "mine 1"}, {}):
        answer = client.post(f"/v1/{path}", json=body, headers=headers)
        name = f"{prefix}-{answer.headers['x-request-id']}"
        assert answer.json()["id"] == name
        recent = [ended.request_id for ended in served.server._service.bridge.recent]
        assert len(recent) == len(set(recent)), "however often a client sends the same"
        assert [one.rpartition("-")[0] for one in recent[-2:]] == [name, name]


def test_fields_that_ask_for_nothing_and_unknown_ones_are_taken(client: httpx.Client) -> None:
    body = {
        "messages": HI,
        "max_tokens": 2,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "function_call": "auto",
        "bad_words": [],
        "return_token_ids": False,
        "best_of": 1,
        "n": None,
        "user": "me",
        "never_heard_of": {"a": [1]},
    }
    assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b'{"prompt": "\\ud800"}', b"[" * 200_000, b'{"prompt": 1e999}']
)
def test_what_is_not_a_document_is_refused(client: httpx.Client, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert msgspec.json.decode(answer.content, type=ErrorResponse).error.type == "invalid_request_error"


def test_wrong_ways_in_have_the_same_shape(client: httpx.Client) -> None:
    assert_is_error(client.get("/nowhere"), 404, "GET /nowhere")
    answer = client.get("/v1/completions")
    assert_is_error(answer, 405, "GET /v1/completions")
    assert answer.headers["allow"] == "POST"
    assert_is_error(client.post("/v1/completions", data={"prompt": "x"}), 415, "expected application/json")
    assert_is_error(client.get("/v1/models/other"), 404, "'tiny' is")


def test_a_request_keeps_its_id_and_its_trace(client: httpx.Client) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"x-request-id": "mine-1", "traceparent": trace}
    for path in ("/health", "/nowhere"):
        answer = client.get(path, headers=headers)
        assert (answer.headers["x-request-id"], answer.headers["traceparent"]) == ("mine-1", trace)
    assert len(client.get("/health").headers["x-request-id"]) == 32
    too_long = client.get("/health", headers={"x-request-id": "x" * 257})
    assert_is_error(too_long, 400, "printable ASCII")


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_callers_trace_reaches_the_engine(
    client: httpx.Client, served: Served, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    submit, seen = served.engine.submit, []

    def spy(prepared: Prepared, on_event: Any) -> RequestId:
        seen.append((prepared.traceparent, prepared.operation))
        return submit(prepared, on_event)

    monkeypatch.setattr(served.engine, "submit", spy)
    body = {"prompt": "x", "messages": HI, "max_tokens": 2, "n": 2}
    for headers in ({"traceparent": trace}, {}):
        assert client.post(f"/v1/{path}", json=body, headers=headers).status_code == 200
    operation = "chat" if path.startswith("chat") else "text_completion"
    assert seen == [(given, operation) for given in (trace, trace, None, None)]


def test_echo_scores_the_prompt_as_transformers_does(client: httpx.Client, tiny_directory: Path) -> None:
    import transformers

    text = "It was a dark and stormy night; " * 8
    body = {
        "prompt": text,
        "max_tokens": 3,
        "temperature": 0,
        "echo": True,
        "logprobs": 2,
        "ignore_eos": True,
    }
    answer = client.post("/v1/completions", json=body).json()
    choice = answer["choices"][0]
    ids = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    found = choice["logprobs"]
    assert found["token_logprobs"][0] is None
    own = [float(row[token]) for row, token in zip(expected, ids[1:], strict=True)]
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=1e-3)
    assert "".join(found["tokens"][: len(ids)]) == text
    assert found["text_offset"][: len(ids)] == list(range(len(text)))
    assert choice["text"].startswith(text)
    assert len(found["tokens"]) == len(ids) + 3 == answer["usage"]["total_tokens"]
    only = client.post("/v1/completions", json={**body, "max_tokens": 0}).json()
    assert only["choices"][0]["text"] == text
    assert only["choices"][0]["logprobs"]["token_logprobs"] == found["token_logprobs"][: len(ids)]
    assert only["usage"]["completion_tokens"] == 0
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    streamed = [value for c in chunks for value in c["choices"][0]["logprobs"]["token_logprobs"]]
    assert streamed[1:] == pytest.approx(found["token_logprobs"][1:], abs=1e-4)
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"], "the prompt comes once"
    assert lines[-1] == "data: [DONE]"


def test_the_document_has_every_route_and_what_it_refers_to(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/metrics",
        "/tokenize",
        "/ready",
    } <= set(document["paths"])
    schemas = document["components"]["schemas"]

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    assert {reference.removeprefix("#/components/schemas/") for reference in references(document)} <= set(
        schemas
    )
    for path in document["paths"].values():
        for operation in path.values():
            for status, answer in operation["responses"].items():
                if status >= "400" and status != "503":
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema["$ref"].endswith("/ErrorResponse")


def test_the_document_says_that_tokenize_takes_one_of_two(client: httpx.Client) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/tokenize"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["$ref"].endswith("/TokenizeRequest")
    given = [(one["required"], one["properties"]) for one in schema["oneOf"]]
    assert given == [
        (["prompt"], {"prompt": {"type": "string"}}),
        (["messages"], {"messages": {"type": "array"}}),
    ]
    for body, status in (
        ({"prompt": "x", "messages": None}, 200),
        ({"prompt": None, "messages": HI}, 200),
        ({"prompt": "x", "messages": HI}, 400),
        ({"prompt": None, "messages": None}, 400),
    ):
        assert client.post("/tokenize", json=body).status_code == status


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize(("path", "unasked"), [("completions", True), ("chat/completions", False)])
def test_special_tokens_go_with_a_text_unless_told_and_with_a_conversation_when_told(
    client: httpx.Client,
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    unasked: bool,
    asked: bool | None,
) -> None:
    encode, seen = served.engine.tokenizer.encode, []

    def spy(text: str, add_special_tokens: bool = True) -> list[int]:
        seen.append(add_special_tokens)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(served.engine.tokenizer, "encode", spy)
    body = {"prompt": "x", "messages": HI, "max_tokens": 1, "add_special_tokens": asked}
    assert client.post(f"/v1/{path}", json=body).status_code == 200
    assert seen == [unasked if asked is None else asked]


def test_the_page_is_one_file_without_foreign_parts(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert len(answer.content) < 25_000
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not [part for part in ("src=", "@import", "url(", "https:") if part in answer.text]


def test_the_feed_shows_what_runs_and_what_has_ended(client: httpx.Client, served: Served) -> None:
    client.post("/v1/completions", json={"prompt": "secret words", "max_tokens": 3, "ignore_eos": True})
    with (
        client.stream(
            "POST",
            "/v1/completions",
            json={"prompt": "x", "max_tokens": 1000, "stream": True, "ignore_eos": True, "n": 16},
        ) as busy,
        client.stream("GET", "/v1/kvrelay/live") as feed,
    ):
        lines = busy.iter_lines()  # held: a dropped iterator closes the stream
        next(lines)
        for line in islice(feed.iter_lines(), 40):
            snapshot = json.loads(line.removeprefix("data: ") or "{}")
            if snapshot.get("in_flight"):
                break
    assert "secret" not in line
    assert snapshot["model"] == "tiny"
    assert {worker["worker_id"] for worker in snapshot["workers"]} == {"prefill-0", "decode-0"}
    ended = snapshot["recent"][-1]
    assert (ended["num_prompt_tokens"], ended["num_output_tokens"]) == (12, 3)
    assert sum(ended["parts_s"].values()) == pytest.approx(ended["e2e_s"])
    running = snapshot["in_flight"][-1]
    assert running["part"] in ("queue", "prefill", "transfer_wait", "decode_queue", "first_decode", "decode")
    assert running["num_prompt_tokens"] == 1


def test_many_viewers_and_many_requests_cost_one_short_snapshot(
    client: httpx.Client, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_SHOWN", 2)
    body = {"prompt": "x", "max_tokens": 1000, "stream": True, "ignore_eos": True, "n": 5}

    async def look() -> tuple[bytes, bytes]:
        feed = live.LiveFeed(served.server._service)
        return await feed.latest(), await feed.latest()

    with client.stream("POST", "/v1/completions", json=body) as busy:
        lines = busy.iter_lines()
        next(lines)
        first, second = asyncio.run(look())
    assert first is second, "taken once for both"
    snapshot = json.loads(first.removeprefix(b"data: "))
    assert (len(snapshot["in_flight"]), snapshot["num_in_flight"]) == (2, 5)


def test_errors_of_the_engine_have_their_statuses(tiny_directory: Path) -> None:
    """One decode sequence at a time, one request may wait, at most half a second."""
    settings = {"max_num_seqs": 1, "max_queued_requests": 1, "queue_timeout_s": 0.5, "num_kv_blocks": 17}
    long = {"prompt": "x", "max_tokens": 1000, "stream": True, "ignore_eos": True}
    with (
        tiny_server(tiny_directory, **settings) as served,
        httpx.Client(base_url=served.url, timeout=60) as client,
    ):
        answers = []
        with client.stream("POST", "/v1/completions", json=long) as first:
            lines = first.iter_lines()
            next(lines)
            body = {"prompt": ["a" * 900] * 40, "max_tokens": 100, "ignore_eos": True}
            answers.append(client.post("/v1/completions", json=body))
        assert_is_error(answers[0], 429, "max_queued_requests=1")
        assert int(answers[0].headers["retry-after"]) >= 1
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_a_worker_changes_its_role_by_request(tiny_directory: Path) -> None:
    with (
        tiny_server(tiny_directory, decode_workers=2) as served,
        httpx.Client(base_url=served.url, timeout=60) as client,
    ):
        changed = client.post("/v1/kvrelay/workers/decode-1/role", json={"role": "prefill"})
        assert changed.status_code == 200, changed.text
        assert changed.json()["role"] == "prefill"
        workers = {w["worker_id"]: w["role"] for w in client.get("/v1/kvrelay/workers").json()["workers"]}
        assert workers == {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "prefill"}
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        wrong = client.post("/v1/kvrelay/workers/decode-0/role", json={"role": "cook"})
        assert_is_error(wrong, 400, "cook", "role")
        unknown = client.post("/v1/kvrelay/workers/nobody/role", json={"role": "decode"})
        assert unknown.status_code == 400
        assert "nobody" in unknown.json()["error"]["message"]
