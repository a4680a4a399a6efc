"""StreamingLLM as a ranking: age, but for the sinks."""

from __future__ import annotations

from torch import Tensor

from kvlab.kernels.evict import Stays
from kvlab.methods.axis import Method
from kvlab.methods.cache.ephemeral import one_pass
from kvlab.methods.cache.interface import Cache
from kvlab.methods.cache.ranking import Ranking
from kvlab.methods.cache.windows import ReadsWindow, window_of
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.eviction.streaming_llm.params import StreamingParams


class StreamingLLM(Ranking):
    """The first `sinks` rows and the newest stay, the same for all heads."""

    params: StreamingParams

    def __init__(self, params: StreamingParams) -> None:
        super().__init__(params)
        self.grows = params.generated == "keep"
        self.in_cache = params.positions == "cache"
        self.by_turn = params.turns

    def stays(self, budget: Tensor) -> Stays:
        return Stays(sinks=self.params.sinks)

    def scoring(
        self, config: DecoderConfig, method: Method, passes: int | None = None
    ) -> Cache | None:
        past, sinks = window_of(method), self.params.sinks
        if past is None or self.in_cache or self.grows or self.by_turn:
            return None
        if sinks and config.windows is not None:  # sinks leave such layers once out of their window
            return None
        return one_pass(config, ReadsWindow(past - sinks + 1, sinks), passes)
