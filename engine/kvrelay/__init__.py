"""kvrelay: prefill and decode in separate processes, one KV-cache relay between them.

`from kvrelay import LLM, AsyncLLM, SamplingParams` is all that most programs need; importing it costs
neither torch nor transformers.
"""

from kvrelay.config import EngineConfig
from kvrelay.llm import LLM, AsyncLLM, RequestsFailed
from kvrelay.metrics import Report, Timings
from kvrelay.outputs import Energy, RequestOutput, StreamEvent
from kvrelay.types import SamplingParams
from kvrelay.version import __version__

__all__ = [
    "LLM",
    "AsyncLLM",
    "Energy",
    "EngineConfig",
    "Report",
    "RequestOutput",
    "RequestsFailed",
    "SamplingParams",
    "StreamEvent",
    "Timings",
    "__version__",
]
