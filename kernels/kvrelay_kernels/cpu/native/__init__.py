"""C++ kernels behind a C interface (``kernels/csrc``), loaded with ctypes, which releases the GIL.

float32 and bfloat16, head_dim a multiple of 8. A module named as an operation holds it under the same
name and signature as in ``reference``. Threads: ``torch.get_num_threads()``.
"""
