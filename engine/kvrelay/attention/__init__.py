"""The one seam between the model and attention: stores new K and V in pages, attends over them.

Knows pages and lengths; knows nothing of requests, workers or text.
"""

from kvrelay.attention.call import dense_backend
from kvrelay.attention.paged import PagedAttention
from kvrelay.attention.spans import Span

__all__ = ["PagedAttention", "Span", "dense_backend"]
