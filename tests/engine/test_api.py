"""The Python API as the README shows it."""

import asyncio
import time
from pathlib import Path

import pytest
import torch

from kvrelay import LLM, AsyncLLM, RequestOutput, SamplingParams
from kvrelay.errors import InvalidRequest, KVRelayError
from tiny_engine import greedy, prompts, tiny_llm

PARTS = ("queue_s", "prefill_s", "transfer_wait_s", "decode_queue_s", "first_decode_s", "decode_s")


@pytest.fixture(scope="module")
def llm(tiny_directory: Path) -> LLM:
    with tiny_llm(tiny_directory, power_model="idle_w=5,busy_w=20") as llm:
        yield llm


def test_an_output_holds_what_the_readme_says(llm: LLM) -> None:
    text, ids = llm.generate(["hello there", [5, 6, 7]], greedy(8))
    assert text.prompt == "hello there"
    assert ids.prompt is None
    assert ids.prompt_token_ids == [5, 6, 7]
    assert text.prompt_token_ids == llm.engine.tokenizer.encode("hello there")
    assert len(text.token_ids) == 8
    assert text.text == llm.engine.tokenizer.decode(text.token_ids)
    assert (text.finish_reason, text.logprobs) == ("length", None)


def timed(llm: LLM) -> tuple[RequestOutput, float, float]:
    """One request, with the client's own TTFT and end-to-end seconds."""
    start_s = time.monotonic()
    first_s, output = 0.0, None
    for event in llm.stream(prompts(300)[0], greedy(60)):
        if event.token_ids and not first_s:
            first_s = time.monotonic() - start_s
        output = event.output
    assert output is not None
    return output, first_s, time.monotonic() - start_s


def test_the_ledger_adds_up_to_the_clients_own_clock(llm: LLM) -> None:
    """The sums hold exactly; the clocks within 1 %, but for what a busy host adds to single requests."""
    runs = [timed(llm) for _ in range(5)]
    for output, _, _ in runs:
        timings = output.timings
        assert sum(getattr(timings, part) for part in PARTS) == pytest.approx(timings.e2e_s, rel=1e-6)
        assert sum(getattr(timings, part) for part in PARTS[:5]) == pytest.approx(timings.ttft_s, rel=1e-6)
        assert min(getattr(timings, part) for part in PARTS) >= 0.0
        assert timings.prefill_s > 0.0
        assert len(timings.itl_s) == 59
        assert sum(timings.itl_s) == pytest.approx(timings.e2e_s - timings.ttft_s, rel=0.01, abs=1e-4)
    ttft_error_s = min(abs(first_s - output.timings.ttft_s) for output, first_s, _ in runs)
    e2e_error_s = min(abs(end_s - output.timings.e2e_s) for output, _, end_s in runs)
    assert ttft_error_s <= max(0.01 * runs[0][1], 0.005), (
        "5 ms: these workers are threads, one runs at a time"
    )
    assert e2e_error_s <= max(0.01 * runs[0][2], 0.005)


def test_energy_is_labelled_and_its_parts_sum_to_the_total(llm: LLM) -> None:
    outputs = llm.generate(prompts(200, 250, 300), greedy(60))
    time.sleep(0.4)
    report = llm.report()
    assert outputs[0].energy.source == report.energy_source == "model(idle_w=5,busy_w=20)"
    assert outputs[0].energy.decode_j is None or outputs[0].energy.decode_j > 0.0
    joules = [phase.joules for phase in report.phases.values()]
    assert sum(joules) + report.idle_j == pytest.approx(report.total_j, rel=0.01)
    assert report.phases["decode"].tokens_per_joule == pytest.approx(
        report.phases["decode"].num_tokens / report.phases["decode"].joules
    )
    bounds = report.energy["lower_j"], report.energy["upper_j"]
    assert bounds[0] <= report.total_j <= bounds[1]


def test_without_a_meter_energy_is_unknown_and_says_why(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, mode="colocated", meter="none") as llm:
        (output,) = llm.generate(prompts(20), greedy(4))
        report = llm.report().to_dict()
    assert (output.energy.prefill_j, output.energy.decode_j, output.energy.source) == (None, None, None)
    assert report["energy_source"] is None
    assert report["total_j"] is None
    assert all(phase["tokens_per_joule"] is None for phase in report["phases"].values())
    assert report["energy_note"]


def test_stop_strings_cut_the_text_and_end_the_request(llm: LLM) -> None:
    (free,) = llm.generate(prompts(20), greedy(40))
    stop = free.text[7:9]
    (stopped,) = llm.generate(prompts(20), SamplingParams(max_tokens=40, temperature=0.0, stop=stop))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    (other,) = llm.generate(prompts(20), greedy(40, stop=["never seen", stop], min_tokens=40))
    assert other.text == free.text, "stop strings wait for min_tokens"


def test_stop_tokens_end_the_request_and_eos_can_be_ignored(llm: LLM) -> None:
    (free,) = llm.generate(prompts(20), greedy(40))
    token = free.token_ids[5]
    (stopped,) = llm.generate(prompts(20), greedy(40, stop_token_ids=[token]))
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert stopped.finish_reason == "stop"
    (later,) = llm.generate(prompts(20), greedy(40, stop_token_ids=[token], min_tokens=20))
    assert len(later.token_ids) >= 20


def test_logprobs_are_those_of_transformers(llm: LLM, tiny_directory: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32)
    (prompt,) = prompts(70)
    (output,) = llm.generate([prompt], greedy(8, logprobs=3))
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert output.logprobs is not None
    for row, token, logprobs in zip(expected, output.token_ids, output.logprobs, strict=True):
        assert logprobs.token_id == token
        assert logprobs.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert logprobs.top == pytest.approx({int(i): float(row[i]) for i in row.topk(3).indices}, abs=1e-4)


def test_chat_uses_the_models_template(llm: LLM) -> None:
    message = [{"role": "user", "content": "hi"}]
    (one,) = llm.chat(message, greedy(4))
    assert one.prompt_token_ids == llm.engine.tokenizer.encode("<|user|>hi\n<|assistant|>")
    assert len(llm.chat([message, message], greedy(4))) == 2


def test_params_may_differ_by_prompt(llm: LLM) -> None:
    outputs = llm.generate(prompts(5, 6), [greedy(3), greedy(5)])
    assert [len(output.token_ids) for output in outputs] == [3, 5]
    with pytest.raises(InvalidRequest, match="1 sampling params for 2 prompts"):
        llm.generate(prompts(5, 6), [greedy(3)])


def test_one_prompt_or_many_and_none(llm: LLM) -> None:
    assert len(llm.generate("one", greedy(2))) == 1
    assert len(llm.generate([5, 6, 7], greedy(2))) == 1
    assert llm.generate([], greedy(2)) == []


def test_many_requests_at_once(llm: LLM) -> None:
    lengths = [1 + 7 * index % 120 for index in range(100)]
    outputs = llm.generate(prompts(*lengths), greedy(10))
    assert [len(output.prompt_token_ids) for output in outputs] == lengths
    assert len({output.request_id for output in outputs}) == 100


def test_two_engines_fit_in_one_process(tiny_directory: Path, llm: LLM) -> None:
    with tiny_llm(tiny_directory, mode="colocated") as other:
        mine, theirs = llm.generate(prompts(30), greedy(8)), other.generate(prompts(30), greedy(8))
    assert mine[0].token_ids == theirs[0].token_ids


def test_async_streams_run_together_and_can_be_left(tiny_directory: Path) -> None:
    async def scenario() -> tuple[list[RequestOutput], int]:
        settings = {"transport": "inproc", "num_kv_blocks": 64, "dtype": "float32"}
        async with AsyncLLM(str(tiny_directory), **settings) as llm:
            for wrong in ({}, [], 0, ""):
                with pytest.raises(InvalidRequest, match="params: expected SamplingParams"):
                    await llm.generate("abc", wrong)  # type: ignore[arg-type]
            left = llm.stream(prompts(40)[0], greedy(900))
            await anext(left)
            await left.aclose()
            outputs = await asyncio.gather(
                *[llm.generate(prompt, greedy(12)) for prompt in prompts(20, 90, 150)]
            )
            with pytest.raises(InvalidRequest, match="empty"):
                await llm.generate([], greedy(2))
            chat = await llm.chat([{"role": "user", "content": "hi"}], greedy(3))
            assert len(chat.token_ids) == 3
            return outputs, llm.report().num_requests["aborted"]

    outputs, num_aborted = asyncio.run(scenario())
    assert [len(output.token_ids) for output in outputs] == [12, 12, 12]
    assert num_aborted == 1


def test_an_unfinished_stream_is_aborted_when_it_is_left(llm: LLM) -> None:
    before = llm.report().num_requests["aborted"]
    for event in llm.stream(prompts(30)[0], greedy(500)):
        if event.token_ids:
            break
    deadline_s = time.monotonic() + 5
    while llm.report().num_requests["aborted"] == before and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert llm.report().num_requests["aborted"] == before + 1
    assert llm.report().num_requests["running"] == 0


def test_errors_form_one_tree() -> None:
    from kvrelay.errors import ERRORS

    assert all(issubclass(error, KVRelayError) for error in ERRORS.values())
