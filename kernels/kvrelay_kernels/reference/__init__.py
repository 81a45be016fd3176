"""Plain torch, any dtype up to float64, any device: the specification of every operation.

Written to be read and to be trusted; fast enough for tests and for the quality benchmark, not for serving.
Each module holds one operation under the same name and signature as in ``api`` (without ``impl``).
"""
