"""A tiny random model with a tokenizer and a chat template, and what the engine's tests share."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvrelay import LLM, RequestOutput, SamplingParams
from kvrelay.types import KVLayout, Role, WorkerId
from kvrelay.wire import Descriptor, Hello

MAX_POSITIONS = 1024
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tiny_model(directory: Path, **overrides: Any) -> Path:
    """A float32 Llama (4 layers, 4 query and 2 KV heads of 16) over bytes, written as Hugging Face does."""
    import transformers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE
    )
    fast.save_pretrained(directory)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": len(vocabulary),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": MAX_POSITIONS,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": False,
        }
        | overrides
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    return directory


def tiny_llm(directory: Path, **settings: Any) -> LLM:
    """An engine on the tiny model: threads of this process unless told otherwise, block digests on."""
    defaults = {"transport": "inproc", "dtype": "float32", "num_kv_blocks": 64, "verify_kv": True}
    return LLM(str(directory), **{**defaults, "threads_per_worker": 1, **settings})


def hello(worker_id: str, role: Role, num_blocks: int = 64) -> Hello:
    """What a worker of the tests of the router says when it is ready."""
    layout = KVLayout(model="m", dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8)
    worker = WorkerId(worker_id)
    descriptor = Descriptor(worker_id=worker, epoch=1, layout=layout, num_blocks=num_blocks, address={})
    return Hello(
        worker_id=worker,
        pid=1,
        role=role,
        device="cpu",
        model_impl="torch",
        num_threads=1,
        descriptor=descriptor,
        load_s=0.0,
    )


def prompts(*lengths: int) -> list[list[int]]:
    """One reproducible prompt of each length."""
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(2, 258, (length,), generator=generator).tolist() for length in lengths]


def greedy(max_tokens: int = 32, **fields: Any) -> SamplingParams:
    """Greedy parameters that run to `max_tokens`."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **fields)


def once(llm: LLM, batch: list[list[int]], params: SamplingParams) -> list[list[RequestOutput]]:
    """The outputs of one try."""
    return [llm.generate(batch, params)]


def until_preempted(llm: LLM, batch: list[list[int]], params: SamplingParams) -> list[list[RequestOutput]]:
    """A new engine's outputs, try after try, until a request was preempted: in a pool too small for all,
    that is a matter of who is faster.
    """
    tries = [llm.generate(batch, params)]
    while llm.report().num_requests["preempted"] == 0:
        assert len(tries) < 20, "the pool was meant to be too small for all at once"
        tries.append(llm.generate(batch, params))
    return tries


def assert_all_blocks_home(llm: LLM, timeout_s: float = 10.0) -> None:
    """Every living worker's pool is whole again, tickets included, soon after the last request."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        workers = [worker for worker in llm.report().workers if worker.is_alive]
        if all(worker.num_free_blocks == worker.num_blocks for worker in workers):
            return
        assert time.monotonic() < deadline_s, [
            (w.worker_id, w.num_free_blocks, w.num_blocks) for w in workers
        ]
        time.sleep(0.05)


def eventually(check: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Whether a check comes true in time: a worker's report of its last step may come after an answer."""
    deadline_s = time.monotonic() + timeout_s
    while not (is_true := check()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return is_true


def leftovers() -> set[str]:
    """Worker processes and run directories that this process started and could have left."""
    mine = psutil.Process().children(recursive=True)
    processes = {f"process {child.pid}" for child in mine if "kvrelay.worker" in " ".join(_command(child))}
    roots = {tempfile.gettempdir(), "/tmp"}
    return processes | {str(path) for root in roots for path in Path(root).glob(f"kvrelay-{os.getpid()}-*")}


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []
