"""Loads any model of the `MODELS` table: in C++ where that can run it, else by its architecture's loader."""

from importlib import import_module
from pathlib import Path

import torch

from kvrelay.errors import InvalidConfig
from kvrelay.models.decoder import Decoder
from kvrelay.models.native import NativeDecoder, load_native_decoder, why_not_native
from kvrelay.models.spec import MODELS, ModelSpec


def load_model(
    directory: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    impl: str = "auto",
    rope_scaling: str | None = None,
) -> Decoder | NativeDecoder:
    """Load a Hugging Face directory; `impl` is `auto`, `native` (C++ on the CPU) or `torch`.

    `rope_scaling` is as for `ModelSpec.scaled`.

    The result's `impl` says which it is. Raises `ModelError` as the loaders do, and `InvalidConfig` with the
    reason when `native` was asked for and cannot run here.
    """
    spec = ModelSpec.from_directory(directory).scaled(rope_scaling)
    reason = why_not_native(spec, device, dtype)
    if impl == "native" and reason is not None:
        raise InvalidConfig(f"model_impl='native': {reason}")
    if impl != "torch" and reason is None:
        return load_native_decoder(directory, dtype, spec)
    module, function = MODELS[spec.architecture].loader.split(":")
    decoder: Decoder = getattr(import_module(module), function)(directory, device, dtype, spec)
    return decoder
