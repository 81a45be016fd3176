"""C++ linear layers on weights packed once: ``csrc/linear.h``.

A row's result is the same to the last bit in any batch and on any number of threads.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kvrelay_kernels.cpu.native.library import DTYPES, library
from kvrelay_kernels.cpu.native.transformer_structs import LinearStruct
from kvrelay_kernels.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """Weights ``[num_out, num_in]`` in panels, float32 or bfloat16, and a float32 bias or None."""

    panels: Tensor
    bias: Tensor | None
    num_in: int
    num_out: int

    @property
    def struct(self) -> LinearStruct:
        """As the C interface takes it; points into this object's tensors."""
        bias = None if self.bias is None else self.bias.data_ptr()
        return LinearStruct(
            self.panels.data_ptr(), bias, self.num_in, self.num_out, DTYPES[self.panels.dtype]
        )

    def __call__(self, x: Tensor) -> Tensor:
        """``x [rows, num_in]`` float32 -> float32 ``[rows, num_out]``; weights are widened, sums float32."""
        x = float_rows(x, self.num_in)
        out = torch.empty(len(x), self.num_out)
        struct = self.struct
        library().kvr_linear(
            x.data_ptr(), len(x), ctypes.addressof(struct), torch.get_num_threads(), out.data_ptr()
        )
        return out


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Pack ``weight [num_out, num_in]``, float32 or bfloat16, and an optional ``bias [num_out]``.

    Raises ``InvalidArgument`` for another dtype or an odd ``num_in``.
    """
    if weight.dtype not in DTYPES:
        raise InvalidArgument("weight", needed="float32 or bfloat16", got=weight.dtype)
    num_out, num_in = weight.shape
    if num_in % 2:
        raise InvalidArgument("weight", needed="an even number of inputs", got=tuple(weight.shape))
    pair = 2 * panel_width()
    panels = torch.empty(-(-num_out // pair) * pair * num_in, dtype=weight.dtype)
    packed = PackedLinear(panels, None if bias is None else bias.float().contiguous(), num_in, num_out)
    weight, struct = weight.contiguous(), packed.struct
    library().kvr_pack(
        weight.data_ptr(), ctypes.addressof(struct), panels.data_ptr(), torch.get_num_threads()
    )
    return packed


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of both by panels in turn, filled up with zeros to whole panels: SwiGLU reads them at once."""
    width = panel_width()
    missing = -len(gate) % width
    parts = [torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x for x in (gate, up)]
    return torch.stack([x.reshape(-1, width, *x.shape[1:]) for x in parts], dim=1).flatten(0, 2)


def panel_width() -> int:
    """Outputs of one panel on this machine."""
    return int(library().kvr_panel())


def float_rows(x: Tensor, width: int) -> Tensor:
    """``x`` as contiguous float32 ``[rows, width]``; ``InvalidArgument`` for another width."""
    if x.dim() != 2 or x.shape[1] != width:
        raise InvalidArgument("x", needed=f"[rows, {width}]", got=tuple(x.shape))
    return x.float().contiguous()
