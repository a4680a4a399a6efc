"""A decoder whose weights are written by hand so that it recalls perfectly: no training needed."""

import torch

from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import resolve

SHARP = 60.0


def recaller(vocabulary):
    """Return a model of two layers that answers a token with what followed it before.

    The stream has three parts of `vocabulary`: the token, the token and the one before it, and the
    answer. Layer 0 reads two rows alike and fills the second; layer 1 looks for the row whose
    previous token is the one at hand, and fills the third, which the head shows.
    """
    n = vocabulary
    config = DecoderConfig(
        vocab_size=n, width=3 * n, layers=2, heads=1, kv_heads=1, head_dim=n, ffn_width=8,
        rotary_fraction=0.0, windows=(2, None),
    )  # fmt: skip
    model = build(config, resolve({}))
    token, pair, answer = torch.eye(3 * n).split(n)
    nothing = torch.zeros(n, 3 * n)
    with torch.no_grad():
        state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        state |= {name: torch.ones_like(t) for name, t in state.items() if "norm" in name}
        layers = "decoder.layers"
        state["decoder.embedding.weight"] = token.clone()
        state[f"{layers}.0.attention.qkv.weight"] = torch.cat((nothing, nothing, token))
        state[f"{layers}.0.attention.out.weight"] = pair.T.clone() / (3 * n) ** 0.5
        # The pair less half of the token itself leaves half of the token before.
        state[f"{layers}.1.attention.qkv.weight"] = torch.cat(
            (SHARP * token, pair - token / 2, token)
        )
        state[f"{layers}.1.attention.out.weight"] = answer.T.clone()
        state["decoder.output.weight"] = SHARP * answer
        model.load_state_dict(state)
    return model.eval()
