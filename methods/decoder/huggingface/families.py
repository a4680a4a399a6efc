"""The architectures that are read and written."""

from __future__ import annotations

from kvlab.methods.decoder.huggingface import gpt_neox, lckv, llama
from kvlab.methods.decoder.huggingface.family import Family

FAMILIES: tuple[Family, ...] = (*llama.FAMILIES, *gpt_neox.FAMILIES, lckv.FAMILY)
"""In the order in which an export tries them."""
