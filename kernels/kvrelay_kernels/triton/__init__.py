"""Triton kernels of every operation, for CUDA. Imported on use only: ``import kvrelay_kernels`` needs no triton."""
