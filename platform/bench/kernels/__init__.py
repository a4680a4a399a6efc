"""The Triton kernels beside their twins and torch's own attention; each module is a bench."""
