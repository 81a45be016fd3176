"""The real model of the tests: SmolLM2-135M-Instruct, pulled once into the user's own cache and reused."""

from functools import cache
from pathlib import Path

from kvrelay.config import cache_home
from kvrelay.models import hub

NAME = "smollm2-135m-instruct"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees because",
    "Question: What is 17 + 25?\nAnswer:",
    "Les trois couleurs du drapeau français sont",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "1. Wash your hands.\n2. Cut the onions.\n3.",
)


@cache
def smollm2_directory() -> Path:
    """Return the model's Hugging Face directory, fetching it on the first call on a machine."""
    return hub.pull(NAME, cache_home())
