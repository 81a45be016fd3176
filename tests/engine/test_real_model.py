"""The real model through the real engine: the same tokens as transformers, and the command line's answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvrelay import LLM, SamplingParams
from real_model import NAME, PROMPTS, smollm2_directory

ROOT = Path(__file__).resolve().parents[2]


def assert_greedy(outputs: list[list[int]]) -> None:
    """Every token is what transformers, in float32, finds most likely after all those before it."""
    import torch
    import transformers

    directory = smollm2_directory()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        prompt_ids = tokenizer(prompt).input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt_ids + output])).logits[0, len(prompt_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == output, prompt


def served(num_tokens: int, **settings: object) -> list[list[int]]:
    smollm2_directory()
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    with LLM(NAME, dtype="float32", verify_kv=True, **settings) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, params)]


def test_eight_prompts_equal_transformers_through_two_processes() -> None:
    outputs = served(64)
    assert [len(output) for output in outputs] == [64] * len(PROMPTS)
    assert_greedy(outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "colocated"},
        {"prefill_workers": 2, "decode_workers": 2},
        {"prefill_chunk_tokens": 64},
        {"num_kv_blocks": 6},
    ],
)
def test_every_way_equals_two_processes(settings: dict[str, object]) -> None:
    assert served(64, **settings) == served(64)


def run_cli(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "kvrelay", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)


def test_the_command_line_says_paris() -> None:
    smollm2_directory()
    arguments = ("--model", NAME, "--prompt", "The capital of France is", "--temperature", "0")
    done = run_cli("generate", *arguments, "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    done = run_cli("generate", *arguments, "--max-tokens", "8", "--json")
    document = json.loads(done.stdout.splitlines()[-1])
    assert "Paris" in document["outputs"][0]["text"]
    assert document["report"]["phases"]["decode"]["num_tokens"] == 8


def test_the_demo_writes_a_record_that_stands(tmp_path: Path) -> None:
    smollm2_directory()
    path = tmp_path / "demo.json"
    done = run_cli("demo", "--max-tokens", "8", "--output", str(path), "--power-model", "idle_w=5,busy_w=20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(path)
    assert "modelled" in done.stdout
    record = json.loads(path.read_text())
    assert record["gate"]["passed"], record["gate"]
    pids = {worker["pid"] for worker in record["results"]["report"]["workers"]}
    assert len(pids) == 2
    assert record["results"]["router_pid"] not in pids
    assert record["results"]["report"]["kv_bytes_moved"] > 0
    assert len(record["results"]["answers"]) == 8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("generate", "--prompt", "x", "--model", "nope"), "unknown model 'nope'"),
        (("generate", "--prompt", "x", "--temperature", "-1"), "temperature=-1.0"),
        (("generate", "--prompt", "x", "--set", "color=blue"), "color: there is no such setting"),
        (("generate", "--prompt", "x", "--transport", "pigeon"), "expected one of faulty, inproc, nixl, shm"),
        (("models", "pull", "gpt-9"), "gpt-9"),
    ],
)
def test_a_bad_command_is_one_line_and_exit_code_1(arguments: tuple[str, ...], text: str) -> None:
    done = run_cli(*arguments)
    assert done.returncode == 1
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_and_models_list_print_json() -> None:
    smollm2_directory()
    findings = json.loads(run_cli("doctor", "--json").stdout.splitlines()[-1])["findings"]
    assert {"device", "energy meter", "transport", "kernels", "compiler"} <= {f["area"] for f in findings}
    assert all(finding["detail"] for finding in findings)
    listed = json.loads(run_cli("models", "list", "--json").stdout.splitlines()[-1])
    assert NAME in [model["name"] for model in listed["models"]]
