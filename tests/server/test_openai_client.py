"""The `openai` package against the server: whole and streamed, sync and async, every number compared."""

import asyncio
from collections.abc import Iterator

import httpx
import openai
import pytest

from kvrelay.sampling_params import SamplingParams
from tiny_engine import greedy, prompts
from tiny_server import Served, wait_for_blocks

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def direct(served: Served, prompt: str | list[int], params: SamplingParams) -> tuple[str, list[int]]:
    """What the Python API answers."""
    from queue import SimpleQueue

    events: SimpleQueue = SimpleQueue()
    served.engine.submit(served.engine.prepare(prompt, params), events.put)
    while (output := events.get().output) is None:
        pass
    return output.text, output.token_ids


def test_a_completion_is_what_the_python_api_answers(served: Served, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="hello there", max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
    )
    text, _ = direct(served, "hello there", greedy(12))
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 12)
    assert answer.usage.total_tokens == 23


def test_streams_join_to_the_whole(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 20, "seed": 3}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_long_prompts_progress_comes_as_comments_when_asked(served: Served, client: openai.OpenAI) -> None:
    prompt = prompts(1, 700)[1]
    asked = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "stream": True}

    def said(**more: object) -> list[str]:
        body = {**asked, **more, "cache_salt": str(more)}  # nothing is found in the prefix cache
        return httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).text.split("\n\n")

    told = said(kvrelay=True)
    assert told[0] == ": choice 0: 512 of 700 prompt tokens computed"
    assert not any(event.startswith(":") for event in [*told[1:], *said()])
    extra = {"kvrelay": True, "cache_salt": "another"}
    chunks = client.completions.create(model="tiny", **asked, extra_body=extra)
    text, _ = direct(served, prompt, greedy(6))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_usage_can_come_with_every_chunk(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model="tiny", prompt="hello", max_tokens=9, stream=True, stream_options=options
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == counts[-2]
    assert all(chunk.usage.prompt_tokens == 5 for chunk in chunks)


def test_many_prompts_and_many_choices_keep_their_order(served: Served, client: openai.OpenAI) -> None:
    prompts = ["one", "two two", "three"]
    answer = client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=6, temperature=0, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    expected = [direct(served, prompt, greedy(6))[0] for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    assert answer.usage.completion_tokens == 36


def test_a_seed_gives_different_choices_and_the_same_ones_again(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "hello", "n": 3, "max_tokens": 12, "seed": 7}
    first, second = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in second.choices]


def test_token_ids_are_prompts_too(served: Served, client: openai.OpenAI) -> None:
    ids = served.engine.tokenizer.encode("hello")
    one = client.completions.create(model="tiny", prompt=ids, max_tokens=5, temperature=0)
    two = client.completions.create(model="tiny", prompt=[ids, ids], max_tokens=5, temperature=0)
    text = client.completions.create(model="tiny", prompt="hello", max_tokens=5, temperature=0)
    assert one.choices[0].text == text.choices[0].text == two.choices[1].text


def test_stop_strings_and_stop_tokens(served: Served, client: openai.OpenAI) -> None:
    text, token_ids = direct(served, "hello", greedy(30))
    stop = text[5:7]
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 30, "temperature": 0}
    extra = {"ignore_eos": True}
    stopped = client.completions.create(**asked, stop=[stop], extra_body=extra).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    extra["stop_token_ids"] = [token_ids[3]]
    stopped = client.completions.create(**asked, extra_body=extra)
    assert stopped.usage.completion_tokens == token_ids.index(token_ids[3]) + 1
    extra["min_tokens"] = 20
    assert client.completions.create(**asked, extra_body=extra).usage.completion_tokens >= 20


def test_a_logit_bias_forces_and_forbids(served: Served, client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0}
    (token,) = served.engine.tokenizer.encode("z")
    forced = client.completions.create(**asked, logit_bias={str(token): 100})
    assert forced.choices[0].text == "zzzz"
    first = client.completions.create(**asked, logprobs=1).choices[0].logprobs
    best = served.engine.tokenizer.encode(first.tokens[0])[0]
    without = client.completions.create(**asked, logprobs=1, logit_bias={str(best): -100})
    assert without.choices[0].logprobs.tokens[0] != first.tokens[0]


def test_chat_goes_through_the_models_template(served: Served, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HI, max_completion_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    text, _ = direct(served, "<|user|>hi\n<|assistant|>", greedy(8))
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len("<|user|>hi\n<|assistant|>")
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    same = client.chat.completions.create(
        model="tiny", messages=parts, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert same.choices[0].message.content == text


def test_a_chat_stream_names_the_role_first(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": HI, "max_tokens": 10, "seed": 1}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_chat_logprobs_are_of_the_tokens_that_came(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": HI, "max_tokens": 10, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(**asked, top_logprobs=3).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    assert [entry.logprob for entry in streamed] == pytest.approx(
        [entry.logprob for entry in whole], abs=1e-4
    )
    for entry in whole:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == max(top.logprob for top in entry.top_logprobs)
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob), "greedy"
        assert bytes(entry.bytes).decode(errors="replace")


def test_the_ledger_and_the_joules_come_when_asked_for(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 8}
    assert "kvrelay" not in client.completions.create(**asked).model_extra
    by_body = client.completions.create(**asked, extra_body={"kvrelay": True}).model_extra["kvrelay"]
    by_header = client.completions.create(**asked, extra_headers={"X-KVRelay": "1"}).model_extra["kvrelay"]
    for measured in (by_body, by_header):
        parts = ("queue_s", "prefill_s", "transfer_wait_s", "decode_queue_s", "first_decode_s")
        timings = measured["timings"]
        assert sum(timings[part] for part in parts) == pytest.approx(timings["ttft_s"])
        assert measured["energy"]["source"] == "model(idle_w=5,busy_w=20)"
    *_, last = client.completions.create(**asked, stream=True, extra_body={"kvrelay": True})
    assert last.model_extra["kvrelay"]["timings"]["e2e_s"] > 0
    two = client.completions.create(**asked, n=2, extra_body={"kvrelay": True}).model_extra["kvrelay"]
    assert len(two) == 2


def test_errors_are_the_clients_own_kinds(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="'other': it is not served here; 'tiny' is"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="1025"):
        client.completions.create(model="tiny", prompt="x" * 1000, max_tokens=25)
    with pytest.raises(openai.BadRequestError, match="constrained output is not built"):
        client.chat.completions.create(model="tiny", messages=HI, response_format={"type": "json_object"})
    with pytest.raises(openai.BadRequestError, match="tool calls are not built"):
        client.chat.completions.create(
            model="tiny", messages=HI, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert client.models.list().data[0].id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"


def test_many_async_streams_at_once(served: Served) -> None:
    async def scenario() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:

            async def one(index: int) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt="x" * (index + 1), max_tokens=10, seed=index, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(index) for index in range(40)))

    texts = asyncio.run(scenario())
    for index in (0, 17, 39):
        params = SamplingParams(max_tokens=10, seed=index)
        assert texts[index] == direct(served, "x" * (index + 1), params)[0]


def test_a_client_that_leaves_ends_its_request(served: Served, client: openai.OpenAI) -> None:
    before = served.engine.report().num_requests["aborted"]
    stream = client.completions.create(
        model="tiny", prompt="hello", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(
            model="tiny", prompt=["a", "b"], max_tokens=1000, extra_body={"ignore_eos": True}
        )
    wait_for_blocks(served.engine)
    assert served.engine.report().num_requests["aborted"] == before + 3
