"""kvrelay: prefill and decode in separate processes, one KV-cache relay between them.

`from kvrelay import LLM, AsyncLLM, SamplingParams` is all that most programs need; importing it costs
neither torch nor transformers.
"""

from kvrelay.config import EngineConfig
from kvrelay.energy import RequestEnergy
from kvrelay.llm import LLM, AsyncLLM, RequestsFailed
from kvrelay.metrics import Report, Timings
from kvrelay.outputs import RequestOutput, StreamEvent
from kvrelay.sampling_params import SamplingParams
from kvrelay.sparse import SparseAttention
from kvrelay.version import __version__

__all__ = [
    "LLM",
    "AsyncLLM",
    "EngineConfig",
    "Report",
    "RequestEnergy",
    "RequestOutput",
    "RequestsFailed",
    "SamplingParams",
    "SparseAttention",
    "StreamEvent",
    "Timings",
    "__version__",
]
