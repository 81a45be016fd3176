"""Log-probabilities of prompt tokens, as transformers has them, however the prompt is computed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvrelay import RequestOutput
from kvrelay.router.core import Router
from kvrelay.router.policies import open_policy
from kvrelay.router.request import RoutedRequest, Update
from kvrelay.types import RequestId, TicketId, TokenLogprobs, TransferTicket, WorkerId
from kvrelay.wire import NewToken, Prefill, PromptScored, Reserve, Reserved, StepReport
from tiny_engine import assert_all_blocks_home, greedy, hello, prompts, tiny_llm, until_preempted

LENGTHS = (1, 2, 64, 65, 200, 300)


def oracle(directory: Path, prompt: list[int]) -> torch.Tensor:
    """`[len(prompt) - 1, vocab]`: log-probabilities of what follows each token but the last."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)


def assert_equal_to(expected: torch.Tensor, output: RequestOutput, num_top: int) -> None:
    assert output.prompt_logprobs is not None
    first, *rest = output.prompt_logprobs
    assert first is None
    for row, token, entry in zip(expected, output.prompt_token_ids[1:], rest, strict=True):
        assert entry is not None
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        top = {int(i): float(row[i]) for i in row.topk(num_top).indices}
        assert entry.top == pytest.approx(top, abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "colocated"}, {"prefill_chunk_tokens": 64}, {"prefill_chunk_tokens": None}],
    ids=["1P1D", "colocated", "small chunks", "whole"],
)
def test_prompt_logprobs_are_those_of_transformers(tiny_directory: Path, settings: dict[str, Any]) -> None:
    batch = prompts(*LENGTHS)
    with tiny_llm(tiny_directory, **settings) as llm:
        outputs = llm.generate(batch, greedy(1, prompt_logprobs=2))
        plain = llm.generate(batch, greedy(1))
        assert_all_blocks_home(llm)
    for prompt, output, other in zip(batch, outputs, plain, strict=True):
        assert_equal_to(oracle(tiny_directory, prompt), output, 2)
        assert output.token_ids == other.token_ids
        assert other.prompt_logprobs is None


def test_a_stream_has_them_with_its_first_tokens(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory) as llm:
        events = list(llm.stream(prompts(80)[0], greedy(4, prompt_logprobs=0)))
    assert events[0].prompt_logprobs is not None
    assert len(events[0].prompt_logprobs) == 80
    assert [event.prompt_logprobs for event in events[1:]] == [None] * (len(events) - 1)


def test_preemption_does_not_ask_for_them_again(tiny_directory: Path) -> None:
    """A pool that is too small for all: the retries prefill once more, and score nothing twice."""
    batch = prompts(100, 110, 120, 130)
    with tiny_llm(tiny_directory, num_kv_blocks=9) as llm:
        tries = until_preempted(llm, batch, greedy(150, prompt_logprobs=1))
    for prompt, output in [pair for outputs in tries for pair in zip(batch, outputs, strict=True)]:
        assert_equal_to(oracle(tiny_directory, prompt), output, 1)
        assert len(output.token_ids) == 150


def scored(attempt: int, start: int, count: int) -> PromptScored:
    entries = tuple(TokenLogprobs(5, -1.0 - start - index) for index in range(count))
    return PromptScored(request_id=RequestId("r"), attempt=attempt, start=start, logprobs=entries)


def token(attempt: int, token_id: int, **fields: Any) -> StepReport:
    new = NewToken(request_id=RequestId("r"), attempt=attempt, token_id=token_id, **fields)
    return StepReport(
        worker_id="decode-0", phase="decode", start_s=0, end_s=0, cpu_s=0, num_tokens={"r": 1}, tokens=(new,)
    )


class Scene:
    """A router with one request of three prompt tokens whose log-probabilities are wanted."""

    def __init__(self, num_prefill: int = 1) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.updates: list[Update] = []
        self.router = Router(
            open_policy("least_loaded"), lambda w, m: self.sent.append((w, m)), self.updates.append
        )
        for index in range(num_prefill):
            self.router.fleet.add(hello(f"prefill-{index}", "prefill", 8))
        self.router.fleet.add(hello("decode-0", "decode", 8))
        self.request = RoutedRequest(
            request_id=RequestId("r"),
            arrival=0,
            params=greedy(2, prompt_logprobs=0),
            seed=1,
            token_ids=[5, 5, 5],
            num_prompt_tokens=3,
            max_total_tokens=5,
        )
        self.router.submit(self.request, 0.0)

    def reserve(self) -> None:
        attempt = self.request.attempt
        ticket = TransferTicket(
            ticket_id=TicketId(f"t{attempt}"),
            request_id=RequestId("r"),
            attempt=attempt,
            decode_worker=WorkerId("decode-0"),
            epoch=1,
            block_ids=(0,),
            num_tokens=2,
            lease_s=30.0,
        )
        reserved = Reserved(request_id=RequestId("r"), attempt=attempt, ticket=ticket, at_s=0.0)
        self.router.on_message(reserved, 0.0)


def test_tokens_that_overtake_the_scores_wait_for_them() -> None:
    scene = Scene()
    scene.reserve()
    scene.router.on_message(token(1, 7), 1.0)
    scene.router.on_message(token(1, 8, finish_reason="length"), 2.0)
    assert scene.updates == []
    scene.router.on_message(scored(1, 1, 1), 3.0)
    assert scene.updates == []
    scene.router.on_message(scored(1, 2, 1), 4.0)
    assert [update.token_id for update in scene.updates] == [7, 8]
    assert scene.updates[-1].finish_reason == "length"
    assert [entry and entry.logprob for entry in scene.request.prompt_logprobs] == [None, -2.0, -3.0]


def test_tokens_that_waited_end_with_their_request() -> None:
    """Its owner finds a stop string in the first of them: the second is nobody's."""
    scene = Scene()
    scene.reserve()
    told: list[Update] = []

    def stop_at_once(update: Update) -> None:
        told.append(update)
        scene.router.finish(update.request_id, "stop", update.at_s)

    scene.router._deliver = stop_at_once
    scene.router.on_message(token(1, 7), 1.0)
    scene.router.on_message(token(1, 8), 2.0)
    scene.router.on_message(scored(1, 1, 2), 3.0)
    assert [update.token_id for update in told] == [7, None]
    assert scene.request.token_ids == [5, 5, 5, 7]


def test_a_writer_that_dies_before_it_has_told_them_is_replaced() -> None:
    """Its KV is with decode, so that nothing else would ever come: the request must not wait for ever."""
    scene = Scene(num_prefill=2)
    scene.reserve()
    scene.router.on_message(scored(1, 1, 1), 1.0)
    scene.request.is_committed = True
    scene.router.on_message(token(1, 7), 1.5)
    assert scene.request.prefill is not None
    scene.router.on_worker_dead(scene.request.prefill, "killed", 2.0)
    assert scene.request.attempt == 2
    assert scene.request.prompt_logprobs == [None]
    reserve = scene.sent[-1][1]
    assert isinstance(reserve, Reserve)
    assert reserve.request.prompt_logprobs == 0
    assert reserve.request.token_ids == (5, 5, 5), "the token that was held is computed again"
    scene.reserve()
    assert isinstance(scene.sent[-1][1], Prefill)
    scene.router.on_message(scored(2, 1, 2), 3.0)
    scene.router.on_message(token(2, 7), 4.0)
    assert [update.token_id for update in scene.updates] == [7]


def test_a_retry_after_them_does_not_ask_again() -> None:
    scene = Scene(num_prefill=2)
    scene.reserve()
    scene.router.on_message(scored(1, 1, 2), 1.0)
    scene.router.on_worker_dead(scene.request.prefill, "killed", 2.0)
    assert scene.request.spec().prompt_logprobs is None


def test_the_count_is_checked() -> None:
    with pytest.raises(ValueError, match="prompt_logprobs=21: expected 0 to 20"):
        greedy(1, prompt_logprobs=21)
