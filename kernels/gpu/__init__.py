<<<<<<< HEAD
"""Triton kernels: imported only where tensors are on CUDA. Their twins are in the folder above."""
=======
"""Triton kernels, each with the signature of its plain torch twin in kvlab.kernels."""
>>>>>>> 85af489bc78ec9fbfd73fe1421a951204cb5c6fd
