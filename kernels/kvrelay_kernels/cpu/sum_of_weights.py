"""The sum of a row's sampling weights: C++ (``csrc/sampling.h``) where it was built, else numpy.

On one thread: it is short, and others have the cores.
"""

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cpu.native.library import instruction_set, library

RELATIVE_ERROR = 2.0**-17


def sum_of_weights(below: NDArray[np.float32], temperature: float) -> float:
    """Sum of ``exp(below / temperature)``, within ``RELATIVE_ERROR`` for up to a million tokens.

    below: contiguous ``[V]``, its largest 0; temperature: within 1e-30 and 1e30. Two float32 roundings put a
    log-weight x off by |x| / 2^23, the mean of |x| over the distribution is at most ln V, exponentials are
    good to three units in the last place, and few float32 terms are added up one by one.
    """
    if instruction_set() is not None:
        return float(library().kvr_sum_of_weights(below.ctypes.data, len(below), temperature))
    weights = below / np.float32(temperature)
    return float(np.exp(weights, out=weights).sum())
