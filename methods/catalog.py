"""Every value and preset that kvlab ships. A method becomes known by its line here."""

from __future__ import annotations

from kvlab.methods.axis import Preset, Value
from kvlab.methods.block_transformer import params as block_transformer
from kvlab.methods.budget.global_topk import params as global_topk
from kvlab.methods.budget.per_layer import params as per_layer
from kvlab.methods.budget.pyramidkv import params as pyramidkv
from kvlab.methods.budget.squeeze_attention import params as squeeze_attention
from kvlab.methods.budget.uniform import params as uniform
from kvlab.methods.decoder import token
from kvlab.methods.eviction.adore import params as adore
from kvlab.methods.eviction.full import params as full
from kvlab.methods.eviction.h2o import params as h2o
from kvlab.methods.eviction.observed_attention import params as observed_attention
from kvlab.methods.eviction.sliding_window import params as sliding_window
from kvlab.methods.eviction.snapkv import params as snapkv
from kvlab.methods.eviction.streaming_llm import params as streaming_llm
from kvlab.methods.precision.fp8 import params as fp8
from kvlab.methods.precision.int8 import params as int8
from kvlab.methods.precision.kivi import params as kivi
from kvlab.methods.prefill import params as prefill
from kvlab.methods.sharing import values as sharing

ENTRIES: tuple[Value | Preset, ...] = (
    *sharing.ENTRIES,
    token.ENTRY,
    block_transformer.ENTRY,
    full.ENTRY,
    sliding_window.ENTRY,
    streaming_llm.ENTRY,
    h2o.ENTRY,
    snapkv.ENTRY,
    observed_attention.ENTRY,
    adore.ENTRY,
    uniform.ENTRY,
    squeeze_attention.ENTRY,
    pyramidkv.ENTRY,
    per_layer.ENTRY,
    global_topk.ENTRY,
    int8.ENTRY,
    fp8.ENTRY,
    kivi.ENTRY,
    *prefill.ENTRIES,
)
