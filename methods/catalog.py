"""Every value and preset that kvlab ships. A method becomes known by its line here."""

from __future__ import annotations

from kvlab.methods.axis import Preset, Value
from kvlab.methods.block_transformer import params as block_transformer
from kvlab.methods.decoder import token
from kvlab.methods.eviction.full import params as full
from kvlab.methods.eviction.sliding_window import params as sliding_window
from kvlab.methods.prefill import params as prefill
from kvlab.methods.sharing import values as sharing

ENTRIES: tuple[Value | Preset, ...] = (
    *sharing.ENTRIES,
    token.ENTRY,
    block_transformer.ENTRY,
    full.ENTRY,
    sliding_window.ENTRY,
    *prefill.ENTRIES,
)
