"""Triton kernels of every operation, for CUDA. Imported on use: `import kvrelay_kernels` needs no triton."""
