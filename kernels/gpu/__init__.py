"""Triton kernels: imported only where tensors are on CUDA. Their twins are in the folder above."""
