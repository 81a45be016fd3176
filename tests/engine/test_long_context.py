"""Sequences beyond the trained length: scaling asked for by name, and pools that say what they lack."""

import dataclasses
import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from msgspec.structs import replace

from kvrelay import EngineConfig
from kvrelay.errors import InvalidConfig
from kvrelay.models.spec import ModelSpec
from kvrelay.types import KVLayout, num_blocks
from kvrelay.worker import loading
from kvrelay.worker.loading import model_identity, size_pool
from tiny_engine import greedy, prompts, tiny_llm, write_tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def short_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, trained for 128 positions."""
    return write_tiny_model(tmp_path_factory.mktemp("short"), max_position_embeddings=128)


def with_scaling(directory: Path, target: Path, kind: str, factor: float) -> Path:
    """The same model whose config.json asks for the scaling, as Hugging Face would write it."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    config.pop("rope_parameters", None)
    config["rope_scaling"] = {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
    }
    config["max_position_embeddings"] = int(128 * factor)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_tokens_beyond_the_trained_length_equal_those_of_transformers(
    short_directory: Path, tmp_path: Path, kind: str
) -> None:
    import transformers

    prompt = prompts(300)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        with_scaling(short_directory, tmp_path / "scaled", kind, 4.0), dtype=torch.float32
    )
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, 300:].tolist()
    with torch.inference_mode():
        scores = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    with tiny_llm(short_directory, rope_scaling=f"{kind}:4", num_kv_blocks=None, num_kv_tokens=700) as llm:
        assert llm.engine.max_model_len == 512
        (output,) = llm.generate(prompt, greedy(40, prompt_logprobs=0))
        assert {worker.num_blocks for worker in llm.report().workers} == {num_blocks(700)}
    assert output.token_ids == expected
    found = [each.logprob for each in output.prompt_logprobs or () if each is not None]
    wanted = [scores[position, token].item() for position, token in enumerate(prompt[1:])]
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    "wrong", ["yarn", "yarn:", "yarn:1", "yarn:nan", "yarn:5000", "dynamic:2", "llama3:4", "4"]
)
def test_a_bad_scaling_is_refused_before_anything_starts(short_directory: Path, wrong: str) -> None:
    with pytest.raises(InvalidConfig, match=f"rope_scaling='{wrong}'"):
        tiny_llm(short_directory, rope_scaling=wrong)


def test_a_model_with_a_scaling_of_its_own_keeps_it(short_directory: Path, tmp_path: Path) -> None:
    scaled = with_scaling(short_directory, tmp_path / "scaled", "yarn", 2.0)
    with pytest.raises(InvalidConfig, match="scaling of its own, 'yarn' by 2"):
        ModelSpec.from_directory(scaled).scaled("yarn:4")


def test_a_sliding_window_is_not_outgrown(short_directory: Path) -> None:
    spec = dataclasses.replace(ModelSpec.from_directory(short_directory), sliding_window=200)
    with pytest.raises(InvalidConfig, match="512 positions; the model's sliding window has 200"):
        spec.scaled("yarn:4")


def test_workers_of_different_scalings_do_not_pair(short_directory: Path) -> None:
    identities = {model_identity(short_directory, scaling) for scaling in (None, "yarn:2", "yarn:4")}
    assert len(identities) == 3


def test_longer_sequences_need_a_scaling(short_directory: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"max_model_len=129: the model has 128 positions.*rope_scaling"):
        tiny_llm(short_directory, max_model_len=129)


def test_a_pool_that_does_not_fit_says_the_bytes(short_directory: Path) -> None:
    spec = ModelSpec.from_directory(short_directory).scaled("yarn:1024")
    layout = KVLayout(model="", dtype="float32", num_layers=200, num_kv_heads=32, head_dim=128)
    tokens = psutil.virtual_memory().total // layout.block_bytes * 64 + 6400
    asked = EngineConfig(model="m", num_kv_tokens=tokens)
    needed = num_blocks(tokens) * layout.block_bytes
    with pytest.raises(InvalidConfig, match=f"num_kv_tokens={tokens} needs {needed} bytes"):
        size_pool(asked, layout, spec, CPU, 1)
    most = psutil.virtual_memory().total // layout.block_bytes * 2 // 3
    shared = EngineConfig(model="m", num_kv_tokens=64 * most)
    assert size_pool(shared, layout, spec, CPU, 1) == most
    with pytest.raises(InvalidConfig, match=r"num_kv_tokens=.* bytes, \d+ with all 2 workers; there are"):
        size_pool(shared, layout, spec, CPU, 2)
    long = EngineConfig(model="m", max_model_len=131072)
    with pytest.raises(InvalidConfig, match=f"max_model_len=131072 needs {2048 * layout.block_bytes} bytes"):
        size_pool(long, layout, spec, CPU, 1)
    sparse = EngineConfig(model="m", num_kv_tokens=tokens, attention="sparse")
    with pytest.raises(InvalidConfig, match="num_kv_tokens") as refusal:
        size_pool(sparse, layout, spec, CPU, 1)
    with_stats = int(str(refusal.value).split("needs ")[1].split()[0])
    assert 1.039 < with_stats / needed < 1.041
    with pytest.raises(InvalidConfig, match="num_kv_tokens=640: expected one of it and num_kv_blocks=3"):
        EngineConfig(model="m", num_kv_tokens=640, num_kv_blocks=3)


LAYOUT = KVLayout(model="", dtype="float32", num_layers=200, num_kv_heads=32, head_dim=128)


def test_an_asked_pool_that_holds_no_sequence_of_the_asked_length_is_refused(short_directory: Path) -> None:
    spec = ModelSpec.from_directory(short_directory).scaled("yarn:1024")
    short = EngineConfig(model="m", max_model_len=641, num_kv_tokens=640)
    message = f"max_model_len=641 needs {11 * LAYOUT.block_bytes} bytes .* num_kv_tokens=640 takes "
    with pytest.raises(InvalidConfig, match=f"{message}{10 * LAYOUT.block_bytes}"):
        size_pool(short, LAYOUT, spec, CPU, 1)
    assert size_pool(replace(short, max_model_len=640), LAYOUT, spec, CPU, 1) == 10
    assert size_pool(replace(short, max_model_len=None), LAYOUT, spec, CPU, 1) == 10


def test_listed_workers_pools_are_added_up(short_directory: Path) -> None:
    spec = ModelSpec.from_directory(short_directory)
    most = psutil.virtual_memory().total // LAYOUT.block_bytes
    for prefill, decode, is_refused in ((most // 2, None, True), (most // 4, 64 * (most // 4), False)):
        workers = [{"role": "prefill", "num_kv_blocks": prefill}, {"role": "decode"}]
        engine = EngineConfig.of(model="m", workers=workers, num_kv_tokens=decode or 64 * (most * 2 // 3))
        for worker_id, _ in engine.roles():
            own = engine.of_worker(worker_id)
            if not is_refused:
                assert size_pool(own, LAYOUT, spec, CPU, 2) == most // 4
                continue
            with pytest.raises(InvalidConfig, match=r"num_kv_.* bytes, \d+ with all 2 workers; there are"):
                size_pool(own, LAYOUT, spec, CPU, 2)


def test_an_asked_pool_must_fit_on_its_board(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec.from_directory(short_directory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * LAYOUT.block_bytes, 2**50))
    board = torch.device("cuda")
    assert size_pool(EngineConfig(model="m", num_kv_blocks=3), LAYOUT, spec, board, 1) == 3
    with pytest.raises(InvalidConfig, match=f"num_kv_blocks=4 needs {4 * LAYOUT.block_bytes} bytes on cuda"):
        size_pool(EngineConfig(model="m", num_kv_blocks=4), LAYOUT, spec, board, 1)


def test_a_device_that_runs_out_of_memory_at_the_start_is_reported(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(loading, "load_model", full)
    with pytest.raises(InvalidConfig, match=r"colocated-0 does not fit on its device: .* 2\.00 GiB"):
        tiny_llm(short_directory, mode="colocated")
