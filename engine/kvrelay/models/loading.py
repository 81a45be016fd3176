"""Loads any model of the `MODELS` table by its architecture's own loader."""

from importlib import import_module
from pathlib import Path

import torch

from kvrelay.models.decoder import Decoder
from kvrelay.models.spec import MODELS, ModelSpec


def load_model(directory: Path, device: torch.device | str, dtype: torch.dtype) -> Decoder:
    """Load a Hugging Face directory through `MODELS[architecture].loader`; raises `ModelError` as it does."""
    module, function = MODELS[ModelSpec.from_directory(directory).architecture].loader.split(":")
    decoder: Decoder = getattr(import_module(module), function)(directory, device, dtype)
    return decoder
