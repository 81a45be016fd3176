"""Sparse attention over HTTP: settings of one request, what comes back of them, and the command's flags."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_serve_command import process

from kvrelay import SparseAttention
from tiny_engine import prompts
from tiny_server import Served, tiny_server

LENGTH = 840
LITTLE = {"budget_tokens": 128, "local_blocks": 1, "dense_below_tokens": 0, "candidate_tokens": 0}


@pytest.fixture(scope="module")
def sparse(tiny_directory: Path) -> Iterator[Served]:
    """A sparse server whose KV takes half a second to hand off, and leaves in parts."""
    settings = {"attention": SparseAttention(**{**LITTLE, "budget_tokens": 512}), "kv_handoff": "sparse"}
    with tiny_server(tiny_directory, transport="inproc:gbit_per_s=0.02", **settings) as served:
        yield served


def ask(url: str, length: int = LENGTH, **body: Any) -> httpx.Response:
    asked = {"prompt": prompts(length)[0], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json={**asked, "kvrelay": True, **body}, timeout=60)


def share(measured: dict[str, Any], phase: str) -> float:
    use = measured["attention"][phase]
    assert use["share_of_pairs"] == use["attended_pairs"] / use["causal_pairs"]
    assert use["attended_tokens_per_query"] == use["attended_pairs"] / use["num_queries"]
    return float(use["share_of_pairs"])


def test_a_request_brings_its_own_attention(sparse: Served) -> None:
    """By an object, by a name, and by nothing: what was read is reported, and falls with the budget."""
    little, own, dense = (
        ask(sparse.url, **body, cache_salt=salt).json()["kvrelay"]
        for salt, body in salted({"attention": LITTLE}, {}, {"attention": "dense"})
    )
    for phase in ("prefill", "decode"):
        assert 0.0 < share(little, phase) < share(own, phase) < share(dense, phase) == 1.0
    told = [answer["sparse"] and answer["sparse"]["budget_tokens"] for answer in (little, own, dense)]
    assert told == [128, 512, None]


def salted(*bodies: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A salt for each body: no prompt is found in the prefix cache."""
    return [(f"salt {index}", body) for index, body in enumerate(bodies)]


def test_the_answer_tells_how_its_kv_came(sparse: Served) -> None:
    """All but the first chunk of the prompt is on the way when the first token is there."""
    hand_off = ask(sparse.url, attention=LITTLE).json()["kvrelay"]["hand_off"]
    assert 0 < hand_off["bytes_before_first_token"] < hand_off["num_bytes"]
    assert {"num_stalls", "stall_s"} <= hand_off.keys()


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        ({"budget_tokens": 1000}, "budget_tokens=1000: expected a multiple of 64"),
        ({"dense_layers": [9]}, "dense_layers"),
        ({"nothing": 1}, "nothing"),
        ({"top_p": "much"}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"budget_tokens": 2**40, "top_p": 0.5}, f"budget_tokens={2**40}: expected a multiple of 64"),
        ({"budget_tokens": 64 * 10**30}, "budget_tokens"),
        ({"sink_blocks": 2**30}, f"sink_blocks={2**30}"),
        ({"candidate_tokens": 2**31}, f"candidate_tokens={2**31}: expected a multiple of 64"),
        ({"dense_layers": [0] * 100_000 + [4]}, "dense_layers=4: the model has layers 0 to 3"),
        ({"dense_layers": [[0]]}, "dense_layers"),
        ([], "attention"),
        ("best", "attention='best': expected dense, sparse, auto"),
        (3, "attention"),
    ],
)
def test_settings_that_are_wrong_are_refused_by_name(sparse: Served, attention: Any, reason: str) -> None:
    answer = ask(sparse.url, attention=attention)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert reason in error["message"]


def test_the_largest_settings_cost_what_there_is_to_read(sparse: Served) -> None:
    """Lists as long as these budgets would take gigabytes."""
    largest = {"budget_tokens": 2**31 - 64, "sink_blocks": 2**24, "top_p": 0.5, "dense_below_tokens": 0}
    wide = {**LITTLE, "decode_budget_tokens": 2**31 - 64}, {**LITTLE, "candidate_tokens": 2**31 - 64}
    for attention in (largest, {**largest, "exact": False}, *wide):
        answer = ask(sparse.url, attention=attention)
        assert answer.status_code == 200, answer.text
    assert all(worker.is_alive for worker in sparse.engine.report().workers)


def test_a_dense_server_refuses_sparse_requests_and_says_why(served: Served) -> None:
    answer = ask(served.url, attention="sparse")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "attention")
    assert "started with attention='dense'" in answer.json()["error"]["message"]
    assert ask(served.url, attention="dense", max_tokens=1).status_code == 200


@pytest.mark.usefixtures("no_leftovers")
def test_the_flags_of_the_command_are_the_settings(tiny_directory: Path) -> None:
    """A prompt longer than the model was trained for, read in part, whose KV comes in parts."""
    flags = ("--attention", "sparse", "--kv-handoff", "sparse", "--rope-scaling", "yarn:2")
    with process(tiny_directory, *flags, "--transport", "shm:gbit_per_s=0.02") as (_, url):
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"] == 2048
        answer = ask(url, 1500, attention=LITTLE)
    assert answer.status_code == 200, answer.text
    measured = answer.json()["kvrelay"]
    assert share(measured, "prefill") < 0.5
    assert 0 < measured["hand_off"]["bytes_before_first_token"] < measured["hand_off"]["num_bytes"]
