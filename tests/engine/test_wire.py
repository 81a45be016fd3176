"""The control plane's codec: everything of ours survives the trip, and nothing else gets in."""

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay import codec, wire
from kvrelay.errors import InvalidRequest, ProtocolError
from kvrelay.sampling_params import SamplingParams
from kvrelay.types import (
    HandOff,
    KVLayout,
    RequestId,
    RequestSpec,
    TicketId,
    TokenLogprobs,
    TransferTicket,
    WorkerId,
)

DIRECTIONS = ("router_to_worker", "worker_to_router", "notification")
LAYOUT = KVLayout(model="m", dtype="bfloat16", num_layers=2, num_kv_heads=1, head_dim=8)
DESCRIPTOR = wire.Descriptor(
    worker_id=WorkerId("decode-0"),
    epoch=3,
    layout=LAYOUT,
    num_blocks=4,
    address={"pid": 1, "endpoint": "ipc://x"},
)
PARAMS = SamplingParams(stop="end", stop_token_ids=[1, 2], seed=2**63 - 1, logprobs=3, temperature=0.5)
REQUEST = RequestSpec(
    request_id=RequestId("r"),
    attempt=2,
    arrival=7,
    token_ids=(1, 2, 3),
    num_prompt_tokens=2,
    max_total_tokens=9,
    params=PARAMS,
    seed=2**63 - 1,
)
TICKET = TransferTicket(
    ticket_id=TicketId("decode-0/3/1"),
    request_id=RequestId("r"),
    attempt=2,
    decode_worker=WorkerId("decode-0"),
    epoch=3,
    block_ids=(4, 0),
    num_tokens=2,
    lease_s=1.5,
)
TOKEN = wire.NewToken(
    request_id=RequestId("r"),
    attempt=2,
    token_id=5,
    logprobs=TokenLogprobs(5, -0.25, {5: -0.25, 9: -3.0}),
    finish_reason="stop",
)
WORKER, RID, TID = WorkerId("w"), RequestId("r"), TicketId("t")
EXAMPLES: dict[str, list[wire.Message]] = {
    "router_to_worker": [
        wire.Connect(peer=DESCRIPTOR),
        wire.Reserve(request=REQUEST),
        wire.Prefill(request=REQUEST, ticket=TICKET),
        wire.Abort(request_id=RID, attempt=1),
        wire.Abort(request_id=RID, attempt=1, ticket=TICKET),
        wire.WriterGone(ticket_id=TID, decode_worker=WORKER),
        wire.Wanted(ticket_id=TID, tiles={0: (1, 2), 29: (2**40,)}),
        wire.Shutdown(),
    ],
    "worker_to_router": [
        wire.Hello(
            worker_id=WORKER,
            pid=1,
            role="colocated",
            device="cpu",
            model_impl="native-avx2",
            num_threads=2,
            descriptor=DESCRIPTOR,
            load_s=0.5,
        ),
        wire.StartFailed(worker_id=WORKER, error="ModelError", message="missing"),
        wire.Connected(worker_id=WORKER, peer=WORKER, error="LayoutMismatch: dtype"),
        wire.Reserved(request_id=RID, attempt=1, ticket=TICKET, at_s=1.0),
        wire.Reserved(request_id=RID, attempt=1, ticket=None, at_s=1.0),
        wire.Mark(request_id=RID, attempt=1, event="kv_committed", at_s=1.0),
        wire.StepReport(
            worker_id=WORKER,
            phase="decode",
            start_s=1.0,
            end_s=2.0,
            cpu_s=0.5,
            num_tokens={"r": 1},
            tokens=(TOKEN,),
            moved_bytes={"r": 2**40},
            moved_s={"r": 0.25},
            hand_off={"r": HandOff(1, 2**40, 3, 0.5)},
        ),
        wire.PromptScored(
            request_id=RID, attempt=1, start=1, logprobs=(TokenLogprobs(5, -0.5, {5: -0.5, 7: -1.5}),)
        ),
        wire.Preempted(request_id=RID, attempt=1),
        wire.AttemptFailed(request_id=RID, attempt=1, error="TransferFailed", message="why", retryable=True),
        wire.WriterGone(ticket_id=TID, decode_worker=WORKER),
        wire.Wanted(ticket_id=TID, tiles={0: (1, 2), 29: (2**40,)}),
        wire.Heartbeat(
            worker_id=WORKER,
            at_s=1.0,
            num_free_blocks=1,
            num_blocks=2,
            num_running=0,
            num_waiting=0,
            num_tickets=0,
            peak_blocks=2,
            counters={"writes": 3},
        ),
        wire.CacheChanged(worker_id=WORKER, added=(bytes(16), b"\xff" * 16), removed=(b"0" * 16,)),
        wire.Stopped(worker_id=WORKER, num_leaked_blocks=0),
    ],
    "notification": [
        wire.Filling(ticket_id=TID),
        wire.Arrived(
            ticket_id=TID,
            layout_fingerprint="f",
            may_start=True,
            tiles={0: (1, 2), 1: ()},
            num_bytes=2**40,
            digests={0: "a"},
        ),
        wire.Filled(ticket_id=TID, layout_fingerprint="f", num_tokens=1, num_bytes=2**40, digests=("a", "b")),
    ],
}
MESSAGES = [(direction, message) for direction, all_of in EXAMPLES.items() for message in all_of]
UNIONS = {
    "router_to_worker": codec._ROUTER_TO_WORKER,
    "worker_to_router": codec._WORKER_TO_ROUTER,
    "notification": wire.Notification,
}


def name(value: object) -> str:
    return type(value).__name__ if isinstance(value, wire.Message) else str(value)


def fields(message: wire.Message) -> dict[str, Any]:
    """The message as plain msgpack builtins, ready to be damaged."""
    plain: dict[str, Any] = msgspec.msgpack.decode(codec.encode(message))
    return plain


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_there_is_an_example_of_every_message(direction: str) -> None:
    assert {type(message) for message in EXAMPLES[direction]} == set(get_args(UNIONS[direction]))


@pytest.mark.parametrize(("direction", "message"), MESSAGES, ids=name)
def test_round_trip(direction: str, message: wire.Message) -> None:
    again = codec.decode(codec.encode(message), direction)
    assert again == message
    assert type(again) is type(message)


@pytest.mark.parametrize(("direction", "message"), MESSAGES, ids=name)
def test_a_message_is_refused_where_it_has_no_business(direction: str, message: wire.Message) -> None:
    for other in DIRECTIONS:
        if type(message) not in get_args(UNIONS[other]):
            with pytest.raises(ProtocolError):
                codec.decode(codec.encode(message), other)


@pytest.mark.parametrize(("direction", "message"), MESSAGES, ids=name)
def test_unknown_and_missing_fields_are_refused(direction: str, message: wire.Message) -> None:
    good = fields(message)
    with pytest.raises(ProtocolError, match="surprise"):
        codec.decode(msgspec.msgpack.encode(good | {"surprise": 1}), direction)
    with pytest.raises(ProtocolError):
        codec.decode(msgspec.msgpack.encode(good | {"type": "Surprise"}), direction)
    for field in type(message).__struct_fields__[: len(good) - 1 - len(type(message).__struct_defaults__)]:
        damaged = {key: value for key, value in good.items() if key != field}
        with pytest.raises(ProtocolError, match=field):
            codec.decode(msgspec.msgpack.encode(damaged), direction)


@pytest.mark.parametrize(
    ("direction", "message", "path"),
    [
        ("router_to_worker", EXAMPLES["router_to_worker"][0], ("peer",)),
        ("router_to_worker", EXAMPLES["router_to_worker"][0], ("peer", "layout")),
        ("router_to_worker", EXAMPLES["router_to_worker"][1], ("request",)),
        ("router_to_worker", EXAMPLES["router_to_worker"][1], ("request", "params")),
        ("router_to_worker", EXAMPLES["router_to_worker"][2], ("ticket",)),
    ],
    ids=name,
)
def test_unknown_fields_are_refused_inside_too(
    direction: str, message: wire.Message, path: tuple[str, ...]
) -> None:
    damaged = fields(message)
    inner = damaged
    for key in path:
        inner = inner[key]
    inner["surprise"] = 1
    with pytest.raises(ProtocolError, match="surprise"):
        codec.decode(msgspec.msgpack.encode(damaged), direction)


def test_oversize_input_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    data = codec.encode(wire.Shutdown())
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", len(data))
    assert codec.decode(data, "router_to_worker") == wire.Shutdown()
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", len(data) - 1)
    with pytest.raises(ProtocolError, match=f"{len(data)} bytes; at most {len(data) - 1}"):
        codec.decode(data, "router_to_worker")


def test_deep_nesting_is_a_typed_error() -> None:
    with pytest.raises(ProtocolError):
        codec.decode(b"\x91" * 100_000 + b"\xc0", "router_to_worker")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(DIRECTIONS))
def test_garbage_is_a_typed_error(data: bytes, direction: str) -> None:
    with pytest.raises(ProtocolError):
        codec.decode(data, direction)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MESSAGES), st.integers(0, 500), st.integers(0, 255), st.integers(0, 500))
def test_damage_gives_a_message_of_the_union_or_a_typed_error(
    example: tuple[str, wire.Message], at: int, byte: int, cut: int
) -> None:
    direction, message = example
    data = bytearray(codec.encode(message))
    data[at % len(data)] = byte
    for damaged in (bytes(data), bytes(data[: cut % len(data)])):
        try:
            result = codec.decode(damaged, direction)
        except ProtocolError:
            continue
        assert isinstance(result, get_args(UNIONS[direction]))


BAD_PARAMS: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("max_tokens", None),
    ("max_tokens", 2**64),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "hot"),
    ("temperature", 10**400),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", float("nan")),
    ("top_k", -2),
    ("top_k", 2.0),
    ("top_k", 2**64),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("seed", -(2**63) - 1),
    ("seed", 2**63),
    ("seed", "s"),
    ("stop", [""]),
    ("stop", ["x"] * 17),
    ("stop", 5),
    ("stop", [5]),
    ("stop", "\ud800"),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", "12"),
    ("stop_token_ids", [True]),
    ("stop_token_ids", 3),
    ("stop_token_ids", [2**64]),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", True),
    ("logit_bias", {5: 100.5}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {5: float("nan")}),
    ("logit_bias", {5: "much"}),
    ("logit_bias", {"five": 1.0}),
    ("logit_bias", [5]),
    ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", 1.0),
    ("ignore_eos", "yes"),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 5e-324),  # would make every logit infinite
    ("repetition_penalty", float("inf")),
    ("repetition_penalty", float("nan")),
    ("repetition_penalty", 10**30),
    ("presence_penalty", 2.1),
    ("presence_penalty", float("nan")),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", None),
    ("priority", 2**31),
    ("priority", 0.5),
    ("priority", None),
    ("cache_salt", ""),
    ("cache_salt", "x" * 257),
    ("cache_salt", "\ud800"),
    ("cache_salt", 5),
    ("attention", "quick"),
    ("attention", 7),
]


def test_every_parameter_has_a_bad_value_here() -> None:
    assert {field for field, _ in BAD_PARAMS} == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize(("field", "value"), BAD_PARAMS)
def test_a_bad_parameter_is_refused_by_name(field: str, value: Any) -> None:
    """What is let in here must also survive `encode`: the router encodes it on everyone's thread."""
    with pytest.raises(InvalidRequest, match=f"^{field}="):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(("field", "value"), BAD_PARAMS)
def test_a_bad_parameter_is_refused_by_name_over_the_wire(field: str, value: Any) -> None:
    damaged = fields(wire.Reserve(request=REQUEST))
    damaged["request"]["params"] = {field: value}
    try:
        data = msgspec.msgpack.encode(damaged)
    except (OverflowError, UnicodeEncodeError):
        pytest.skip("msgpack cannot say this at all")
    with pytest.raises(ProtocolError, match=field):
        codec.decode(data, "router_to_worker")


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0}, {"top_k": -1}, {"stop": "x"}, {"stop": ["x", "y"]}, {"seed": 0}, {"logprobs": 0}],
)
def test_good_parameters_are_taken_and_normalised(params: dict[str, Any]) -> None:
    made = SamplingParams(**params)
    assert isinstance(made.stop, tuple)
    assert made == SamplingParams(**{f: getattr(made, f) for f in made.__struct_fields__})
