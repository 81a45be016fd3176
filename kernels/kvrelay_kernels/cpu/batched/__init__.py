"""Batched torch, for where no compiler is: any dtype, no loop over query blocks one by one.

Each module holds one operation under the same name and signature as in ``reference``. Where the reference is
batched torch already (statistics, selection, merge), its function is the one here.
"""
