"""Triton kernels, each with the signature of its plain torch twin in kvlab.kernels."""
