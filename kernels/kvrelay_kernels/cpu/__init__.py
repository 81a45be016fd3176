"""The CPU implementation, twice: C++ (``native``, optional) and batched torch (``batched``, always there).

``impl="cpu"`` takes the first that can run; ``"cpu-native"`` and ``"cpu-torch"`` name one. ``cpu_backend``
says which it is.
"""

import torch

from kvrelay_kernels.cpu.native.library import instruction_set, why_not


def cpu_backend(dtype: torch.dtype = torch.float32, head_dim: int = 64) -> str:
    """What ``impl="cpu"`` runs: ``native-avx512``, ``native-avx2``, ``native-generic`` or ``torch``."""
    return "torch" if why_not(dtype, head_dim) else f"native-{instruction_set()}"
