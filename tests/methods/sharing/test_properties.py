"""Theorems of sharing: passes against token by token, no leak upward or from later tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kvlab.kernels.attention import EMPTY
from kvlab.methods.decoder.language_model import TokenModel, positions_of
from kvlab.methods.decoder.model import Decoder

KvOf = tuple[int, ...]
Make = Callable[..., TokenModel]
Ids = Callable[..., Tensor]
Logits = Callable[..., Tensor]
Twin = Callable[..., Any]

UPWARD = [(0, 1, 4, 4, 4, 4), (0, 4, 4, 4, 4, 5), (1, 1, 1, 4, 4, 4), (2, 3, 2, 5, 0, 1), (5,) * 6]
ONE_PASS = [(0, 1, 2, 2, 2, 2), (0, 1, 1, 1, 1, 5), (0, 0, 2, 2, 4, 4)]
FAMILIES = ["llama", "qwen3", "neox"]
TEXT = torch.tensor([[11, 3, 41, 3, 0, 27, 52]])
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
quick = settings(
    max_examples=20, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@st.composite
def maps(draw: st.DrawFn) -> tuple[int, ...]:
    """Any map at all of two to five layers."""
    layers = draw(st.integers(2, 5))
    return tuple(draw(st.integers(0, layers - 1)) for _ in range(layers))


def gradients(model: TokenModel, ids: Tensor) -> dict[str, Tensor]:
    """Those of the mean loss over ids [B, T], zero where there is none."""
    model.zero_grad()
    score = model(ids)
    score.nll[score.scored].mean().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare gradients, largest alike; every parameter of both."""
    assert set(found) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(
            found[name], grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("family_name", FAMILIES)
@quick
@given(kv_of=maps(), forward=st.integers(0, 3), backward=st.integers(1, 3))
def test_passes_are_those_of_plain_loops(
    shared: Make,
    ids: Ids,
    logits: Logits,
    slow: Twin,
    family_name: str,
    strict: bool,
    kv_of: tuple[int, ...],
    forward: int,
    backward: int,
) -> None:
    """Logits and gradients of m + b passes, for any map."""
    model = shared(
        family_name, kv_of, strict=strict, forward_passes=forward, backward_passes=backward
    )
    twin, text = slow(model.decoder), TEXT
    expected, _ = twin.passes(text[0], forward, backward)
    with torch.no_grad():
        found = logits(model.decoder, text)[0]
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.nn.functional.cross_entropy(expected[:-1], text[0, 1:]).backward()
    golden = {
        f"decoder.{name}": torch.zeros_like(w) if w.grad is None else w.grad
        for name, w in twin.weights.items()
    }
    same(gradients(model, text), golden)


@pytest.mark.parametrize("family_name", FAMILIES)
@quick
@given(kv_of=maps(), strict=st.booleans())
def test_sequential_is_token_by_token(
    shared: Make,
    ids: Ids,
    slow: Twin,
    family_name: str,
    kv_of: tuple[int, ...],
    strict: bool,
) -> None:
    """The sequential mode scores and trains as plain loops do, one token after another."""
    model, text = shared(family_name, kv_of, strict=strict, sequential=True), TEXT
    twin = slow(model.decoder)
    expected = twin.exact(text[0])
    with torch.no_grad():
        found = model.predictions(text)[0][0, 1:]
    torch.testing.assert_close(found, expected[:-1], **CLOSE)
    torch.nn.functional.cross_entropy(expected[:-1], text[0, 1:]).backward()
    golden = {
        f"decoder.{name}": torch.zeros_like(w) if w.grad is None else w.grad
        for name, w in twin.weights.items()
    }
    same(gradients(model, text), golden)


@pytest.mark.parametrize("family_name", FAMILIES)
def test_as_many_passes_as_tokens_are_sequential(
    shared: Make, ids: Ids, kv_of: KvOf, family_name: str
) -> None:
    """With gradient in all of them (m = 0, b = T) training is the same too."""
    text = ids(2, 9)
    one_by_one, parallel = (
        shared(family_name, kv_of, **how)
        for how in ({"sequential": True}, {"forward_passes": 0, "backward_passes": 9})
    )
    with torch.no_grad():
        torch.testing.assert_close(
            parallel.predictions(text)[0][:, 1:], one_by_one.predictions(text)[0][:, 1:], **CLOSE
        )
    same(gradients(parallel, text), gradients(one_by_one, text))


@pytest.mark.parametrize("kv_of", UPWARD, ids=str)
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_after_n_passes_the_first_n_positions_are_exact(
    shared: Make, ids: Ids, logits: Logits, slow: Twin, kv_of: KvOf, passes: int
) -> None:
    """And no more than they: position n still lacks a pass."""
    model = shared("llama", kv_of, forward_passes=passes - 1, backward_passes=1)
    text = ids(1, 9)
    with torch.no_grad():
        exact = slow(model.decoder).exact(text[0])
        found = logits(model.decoder, text)[0]
    torch.testing.assert_close(found[:passes], exact[:passes], **CLOSE)
    assert (found[passes] - exact[passes]).abs().max() > 1e-3


@pytest.mark.parametrize("kv_of", ONE_PASS, ids=str)
@pytest.mark.parametrize("family_name", FAMILIES)
def test_one_pass_maps_ignore_the_number_of_passes(
    shared: Make, ids: Ids, kv_of: KvOf, family_name: str
) -> None:
    text = ids(2, 9)
    once, often, one_by_one = (
        shared(family_name, kv_of, **how)
        for how in (
            {"forward_passes": 0, "backward_passes": 1},
            {"forward_passes": 7, "backward_passes": 2},
            {"sequential": True},
        )
    )
    expected = gradients(once, text)
    for name, grad in gradients(often, text).items():
        assert torch.equal(grad, expected[name])
    same(gradients(one_by_one, text), expected)


@pytest.mark.parametrize("sequential", [False, True], ids=["passes", "sequential"])
def test_later_tokens_and_other_samples_are_not_seen(
    shared: Make, ids: Ids, kv_of: KvOf, sequential: bool
) -> None:
    """Change a token: no logit before it moves, and none of the other sample, padded or not."""
    model = shared("llama", kv_of, sequential=sequential, forward_passes=2, backward_passes=1)
    text = ids(2, 8)
    padded = torch.ones(2, 8, dtype=torch.bool)
    padded[0, :3] = False
    for valid in (None, padded):
        first = 0 if valid is None else 3
        for place in (first, first + 1, 7):
            other = text.clone()
            other[0, place] = (other[0, place] + 1) % model.config.vocab_size
            with torch.no_grad():
                a, b = (model.predictions(some, valid)[0] for some in (text, other))
            # Row t of predictions is made from the tokens before t.
            torch.testing.assert_close(a[0, first + 1 : place + 1], b[0, first + 1 : place + 1])
            torch.testing.assert_close(a[1], b[1])
            if place < 7:
                assert not torch.allclose(a[0, place + 1], b[0, place + 1], atol=1e-3)


@pytest.mark.parametrize("kv_of", UPWARD, ids=str)
def test_the_first_token_reads_nothing_upward(shared: Make, ids: Ids, kv_of: KvOf) -> None:
    """Attention adds exactly zero there, in every pass, and something everywhere else at last."""
    model = shared("llama", kv_of, forward_passes=2, backward_passes=1)
    upward = [i for i, kv in enumerate(kv_of) if kv > i]
    added: dict[int, list[Tensor]] = {i: [] for i in upward}
    for i in upward:
        model.decoder.layers[i].attention.out.register_forward_hook(
            lambda module, inputs, out, i=i: added[i].append(out.detach().abs().amax(-1))
        )
    with torch.no_grad():
        model.predictions(ids(2, 7))
    for seen in added.values():
        assert len(seen) == 3
        assert all((some[:, 0] == 0).all() for some in seen)
        assert (seen[-1][:, 1:] > 0).all()


@pytest.mark.parametrize("sequential", [False, True], ids=["passes", "sequential"])
@pytest.mark.parametrize("family_name", FAMILIES)
def test_padding_changes_nothing(
    shared: Make, ids: Ids, logits: Logits, kv_of: KvOf, family_name: str, sequential: bool
) -> None:
    """Every sample scores as it does alone: left-padded, right-padded, whole."""
    model = shared(family_name, kv_of, sequential=sequential, forward_passes=1, backward_passes=1)
    text, valid = ids(3, 9), torch.ones(3, 9, dtype=torch.bool)
    valid[0, :4] = False
    valid[1, 6:] = False
    with torch.no_grad():
        together, scored = model.predictions(text, valid)
        for sample in range(3):
            alone, real = model.predictions(text[sample, valid[sample]][None])
            torch.testing.assert_close(together[sample, scored[sample]], alone[real], **CLOSE)
    assert scored.sum() == 4 + 5 + 8


@pytest.mark.parametrize("kv_of", [ONE_PASS[0], *UPWARD[1:4]], ids=str)
@pytest.mark.parametrize("window", [(3, None, 3, 3, 2, 3), (2, 2, 2, 2, None, 2)])
def test_windows_of_the_model(
    shared: Make, ids: Ids, logits: Logits, slow: Twin, kv_of: KvOf, window: tuple[int | None, ...]
) -> None:
    """A query's window is its own layer's, whichever layer made the keys."""
    model = shared("llama", kv_of, windows=window, forward_passes=1, backward_passes=2)
    text = ids(1, 9)
    with torch.no_grad():
        expected, _ = slow(model.decoder).passes(text[0], 1, 2)
        found = logits(model.decoder, text)[0]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    ("kv_of", "rest"),
    [
        ((0, 1, 2, 2, 2, 2), {}),
        ((0, 4, 4, 4, 4, 5), {}),
        ((1, 1, 1, 4, 4, 4), {"forward_passes": 0, "backward_passes": 4}),
        ((2, 3, 2, 5, 0, 1), {"strict": True}),
        ((2, 3, 2, 5, 0, 1), {"sequential": True}),
        ((0, 1, 1, 1, 1, 5), {"sequential": True}),
    ],
)
@pytest.mark.parametrize("family_name", ["llama", "neox"])
def test_checkpointing_gradients_changes_none(
    shared: Make, ids: Ids, kv_of: KvOf, rest: dict[str, Any], family_name: str
) -> None:
    model, text = shared(family_name, kv_of, **rest), ids(2, 8)
    model.train()
    expected = gradients(model, text)
    model.checkpoint_gradients(True)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel()
        return tensor

    for on in (True, False):
        model.checkpoint_gradients(on)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = gradients(model, text)
        same(found, expected)
    assert kept[0] < kept[1] / 2, "checkpointing saves activations"


@pytest.mark.parametrize("family_name", FAMILIES)
def test_only_kv_layers_own_keys_and_values(shared: Make, kv_of: KvOf, family_name: str) -> None:
    model, own = shared(family_name, kv_of), shared(family_name, tuple(range(6)))
    c = model.config
    per_layer = 2 * c.kv_heads * c.head_dim * (c.width + c.qkv_bias) + c.head_dim * c.qk_norm
    missing = c.layers - len(set(kv_of))
    assert own.body_parameters() - model.body_parameters() == missing * per_layer
    grads = gradients(model, torch.arange(12).view(1, 12))
    assert all(grad.abs().max() > 0 for grad in grads.values()), "every parameter takes part"


def test_empty_rows_write_nothing(shared: Make, ids: Ids, slow: Twin) -> None:
    """Positions given outright: padding on both sides of a cyclic pass."""
    model, text = shared("llama", (1, 1, 3, 3, 5, 5), forward_passes=9), ids(1, 9)
    positions = positions_of(torch.tensor([[False] * 2 + [True] * 6 + [False]]))
    assert positions is not None
    assert int((positions == EMPTY).sum()) == 3
    decoder: Decoder = model.decoder
    with torch.no_grad():
        found = decoder.head(decoder.body(decoder.embed(text), positions, ids=text))[0, 2:8]
        exact = slow(decoder).exact(text[0, 2:8])
    torch.testing.assert_close(found, exact, **CLOSE)


class Adapted(nn.Module):
    """A linear map with an addition of its own, as LoRA puts in its place."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias, self.inner = inner.weight, inner.bias, inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.5 * self.inner(x.flip(-1))


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kv_of", [(0, 1, 2, 2, 2, 2), (0, 4, 4, 4, 4, 5)], ids=str)
def test_an_adapter_counts_in_every_pass(
    shared: Make, ids: Ids, kv_of: KvOf, recomputed: bool
) -> None:
    """Also where a pass wants only a part of what the map gives."""
    model, text = shared("llama", kv_of), ids(2, 9)
    merged = copy.deepcopy(model)
    for layer, plain in zip(model.decoder.layers, merged.decoder.layers, strict=True):
        layer.attention.qkv = Adapted(layer.attention.qkv)
        weight = plain.attention.qkv.weight
        weight.data += 0.5 * weight.data.flip(-1)
    model.checkpoint_gradients(recomputed)
    torch.testing.assert_close(model(text).nll, merged(text).nll, **CLOSE)
    with torch.no_grad():
        by_parts, whole = (m.start(text, new_tokens=1).logits for m in (model, merged))
    torch.testing.assert_close(by_parts, whole, **CLOSE)


@pytest.mark.parametrize("kv_of", UPWARD, ids=str)
def test_gradients_reach_every_weight_in_half_precision(
    shared: Make, ids: Ids, kv_of: KvOf
) -> None:
    """Autocast keeps the weights it cast: those of passes without gradient must not be used on."""
    model, text = shared("llama", kv_of).float(), ids(2, 12)
    for parameter in model.decoder.layers.parameters():
        parameter.data *= 0.5
    expected = gradients(model, text)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, text)
    for name, grad in expected.items():
        alike = torch.cosine_similarity(found[name].flatten(), grad.flatten(), 0)
        assert alike > 0.9, f"{name}: {alike}"
