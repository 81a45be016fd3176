"""Argument checks shared by the operations. Shapes and dtypes only: never reads a tensor's values,
so a check costs no device synchronisation."""

from torch import Tensor, float16, float32, float64, int32
from torch import bfloat16 as bf16

from kvrelay_kernels.errors import InvalidArgument

FLOATING = (float64, float32, float16, bf16)


def check_shape(argument: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raise unless ``tensor`` has ``shape``; a string in ``shape`` names a dimension of any size."""
    if tensor.shape == shape:
        return
    matches = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        wanted = "[" + ", ".join(str(size) for size in shape) + "]"
        raise InvalidArgument(argument, needed=f"shape {wanted}", got=list(tensor.shape))


def check_floating(argument: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is float64, float32, float16 or bfloat16."""
    if tensor.dtype not in FLOATING:
        raise InvalidArgument(argument, needed="a floating dtype", got=tensor.dtype)


def check_int32(argument: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is int32."""
    if tensor.dtype != int32:
        raise InvalidArgument(argument, needed="dtype int32", got=tensor.dtype)


def check_same(argument: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Raise unless both tensors share a device, and a dtype when ``dtype``."""
    if tensor.device != other.device:
        raise InvalidArgument(argument, needed=f"device of {other_name} ({other.device})", got=tensor.device)
    if dtype and tensor.dtype != other.dtype:
        raise InvalidArgument(argument, needed=f"dtype of {other_name} ({other.dtype})", got=tensor.dtype)
