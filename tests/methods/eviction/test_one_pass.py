"""A parallel pass reads what the live cache would have kept, or says that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.methods.cache.opening import scores_in_one_pass
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve

BY_AGE: list[dict[str, Any]] = [
    {},
    {"sliding_window": {"window": 4}},
    *({"sliding_window": {}, "uniform": {"tokens": n}} for n in (3, 4, 5, 9)),
    *(
        {"streaming_llm": {"positions": "absolute", "sinks": sinks}, "uniform": {"tokens": n}}
        for sinks, n in ((0, 4), (1, 4), (2, 3), (2, 6), (1, 12))
    ),
]


@pytest.mark.parametrize("written", BY_AGE, ids=str)
def test_one_pass_scores_as_the_live_cache(
    model: TokenModel, ids: Callable[..., Tensor], written: dict[str, Any]
) -> None:
    """From the first token on; windows of the model's own included (5 here, in some layers)."""
    method, text = resolve(written), ids(2, 20)
    once = scores_in_one_pass(model.acting, method)
    assert cost_of(model.config, method).score_steps(20) == (1 if once else 20)
    windowed = model.config.windows is not None
    sinks = written.get("streaming_llm", {}).get("sinks", 0)
    assert once == (not (windowed and sinks))
    if not once:
        return
    with torch.no_grad():
        session = model.start(text[:, :1], new_tokens=19, apply=method)
        live = []
        for column in text[:, 1:].unbind(1):
            live.append(-session.logits.log_softmax(-1).gather(1, column[:, None])[:, 0])
            session.step(column)
        nll = model(text, apply=method).nll[:, 1:]
    torch.testing.assert_close(nll, torch.stack(live, 1), rtol=1e-3, atol=1e-3)
