"""Bad input and bad hosts get a clear error that names what was needed and what there was."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from kvrelay import LLM, SamplingParams
from kvrelay.errors import (
    EnergyUnavailable,
    InvalidConfig,
    InvalidRequest,
    KVRelayError,
    ModelError,
    PoolTooSmall,
    UnknownName,
    WorkerFailed,
)
from tiny_engine import MAX_POSITIONS, greedy, prompts, tiny_llm

PAIR = [{"role": "prefill"}, {"role": "decode"}]
BAD_SETTINGS: list[tuple[dict[str, Any], type[KVRelayError], str]] = [
    ({"mode": "both"}, InvalidConfig, "mode"),
    ({"prefill_workers": 0}, InvalidConfig, "prefill_workers=0: expected at least 1"),
    ({"decode_workers": "two"}, InvalidConfig, "decode_workers"),
    ({"decode_wokers": 2}, InvalidConfig, "decode_wokers: there is no such setting; there are model, mode"),
    ({"transport": "carrier-pigeon"}, UnknownName, "expected one of faulty, inproc, nixl, shm"),
    ({"transport": "shm:speed=9"}, InvalidConfig, "there is no option 'speed'"),
    ({"policy": "best"}, UnknownName, "expected one of auto, energy_aware"),
    ({"device": "tpu"}, UnknownName, "expected one of auto, cpu, cuda"),
    ({"dtype": "int4"}, UnknownName, "expected one of auto, float32"),
    ({"dtype": "float16", "device": "cpu"}, InvalidConfig, "float16"),
    ({"attention": "magic"}, UnknownName, "attention='magic'"),
    ({"prefill_chunk_tokens": 100}, InvalidConfig, "a multiple of 64"),
    ({"max_model_len": MAX_POSITIONS + 1}, InvalidConfig, f"the model has {MAX_POSITIONS} positions"),
    ({"lease_s": 0.0}, InvalidConfig, "lease_s"),
    ({"mode": "colocated", "workers": PAIR}, InvalidConfig, "mode='colocated': `workers` lists prefill"),
    ({"num_kv_blocks": 10**9}, InvalidConfig, "num_kv_blocks=1000000000 needs"),
    ({"power_model": "idle=5"}, InvalidConfig, "idle"),
    ({"meter": "thermometer"}, UnknownName, "thermometer"),
    ({"meter": "rapl", "power_model": None}, EnergyUnavailable, "rapl"),
]


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize(("settings", "kind", "text"), BAD_SETTINGS)
def test_a_bad_setting_is_refused_by_name(
    tiny_directory: Path, settings: dict[str, Any], kind: type[KVRelayError], text: str
) -> None:
    if settings.get("meter") == "rapl" and Path("/sys/class/powercap/intel-rapl:0/energy_uj").exists():
        pytest.skip("this host has RAPL")
    with pytest.raises(kind, match=text):
        tiny_llm(tiny_directory, **settings)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([], "prompt: it is empty"),
        ("", "prompt: it is empty"),
        ([1, 2, 258], "token id 258 is not in 0 to 257"),
        ([-1], "token id -1"),
        ([1.5], "token id 1.5"),
        ([True], "token id True"),
        (None, "prompt: expected text or token ids; got NoneType"),
        (7, "prompt: expected text or token ids; got int"),
        (b"text", "prompt: expected text or token ids; got bytes"),
        ("\ud800", "the text cannot be encoded"),
        (list(range(2, 200)) * 6, f"prompt: it has 1188 tokens; max_model_len={MAX_POSITIONS}"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_batch_with_it(tiny_directory: Path, prompt: Any, text: str) -> None:
    with tiny_llm(tiny_directory, mode="colocated") as llm:
        with pytest.raises(InvalidRequest, match=f"prompt 1: .*{text}|prompt 1: {text}"):
            llm.generate([[5, 6], prompt], greedy(2))
        assert llm.report().num_requests["finished"] == 0, "a batch with a bad prompt starts nothing"
        assert len(llm.generate([[5, 6]], greedy(2))[0].token_ids) == 2


def test_what_is_no_list_of_prompts_and_no_parameters_is_refused(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, mode="colocated") as llm:
        with pytest.raises(InvalidRequest, match="prompts: expected a list of prompts; got str"):
            next(llm.stream_many("text", greedy(2)))
        with pytest.raises(InvalidRequest, match="expected SamplingParams or a list of them; got dict"):
            llm.generate("text", {"max_tokens": 2})  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="params: expected SamplingParams; got dict"):
            llm.generate("text", [{"max_tokens": 2}])  # type: ignore[list-item]


def test_a_request_that_no_pool_can_hold_is_refused_with_both_numbers(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, num_kv_blocks=4) as llm:
        with pytest.raises(
            PoolTooSmall,
            match=r"need 5 KV blocks \(200 prompt tokens, 57 to generate\), 327680 bytes; .* has 4",
        ):
            llm.generate(prompts(200), greedy(57))
        assert len(llm.generate(prompts(200), greedy(56))[0].token_ids) == 56


def test_generation_ends_at_the_models_length(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, mode="colocated", max_model_len=40) as llm:
        (output,) = llm.generate(prompts(30), greedy(100))
    assert (len(output.token_ids), output.finish_reason) == (10, "length")


def test_a_missing_model_lists_what_exists() -> None:
    with pytest.raises(UnknownName, match="smollm2-135m-instruct"):
        LLM("no-such-model")


@pytest.mark.usefixtures("no_leftovers")
def test_a_corrupt_weight_file_is_named(tiny_directory: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_directory, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"did not start.*model\.safetensors"):
        tiny_llm(broken, transport="shm")


@pytest.mark.usefixtures("no_leftovers")
def test_a_worker_that_cannot_start_says_why_from_its_own_log(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "safetensors.py").write_text("raise ImportError('the disk with the library is gone')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        WorkerFailed, match=r"(?s)(prefill|decode)-0 did not start: exit code 1.*the disk with the"
    ):
        tiny_llm(tiny_directory, transport="shm")


def test_a_start_that_takes_too_long_ends(tiny_directory: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"not ready after 0\.01 s; still waiting for"):
        tiny_llm(tiny_directory, transport="shm", start_timeout_s=0.01)


def test_sampling_params_are_checked_where_they_are_made() -> None:
    with pytest.raises(InvalidRequest, match="top_p=0"):
        SamplingParams(top_p=0.0)


def test_workers_import_nothing_from_the_working_directory(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "psutil.py").write_text("raise ImportError('hijacked')")
    monkeypatch.chdir(tmp_path)
    with tiny_llm(tiny_directory, transport="shm") as llm:
        assert len(llm.generate([[5, 6, 7]], greedy(2))[0].token_ids) == 2
