"""Triton kernels and their plain torch twins. Needs torch and triton alone."""
