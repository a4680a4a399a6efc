"""How a prompt becomes a cache, and how text is scored: passes and early exit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvlab import KvlabError
from kvlab.methods.axis import MethodError
from kvlab.methods.decoder.generation import left_pad
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve

KvOf = tuple[int, ...]
Make = Callable[..., TokenModel]
Ids = Callable[..., Tensor]
Twin = Callable[..., Any]

WINDOWS = (3, None, 3, 3, 2, 3)
FAMILIES = ["llama", "qwen3", "neox"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
TEXT = torch.tensor([[11, 3, 41, 3, 0, 27, 52, 8, 8, 30, 19, 5]])


@pytest.mark.parametrize("forward", [1, 3])
@pytest.mark.parametrize(
    "kv_of", [(0, 4, 4, 4, 4, 5), (1, 1, 1, 4, 4, 4), (2, 3, 2, 5, 0, 1)], ids=str
)
def test_a_prompt_is_encoded_in_passes(
    shared: Make, ids: Ids, slow: Twin, kv_of: KvOf, forward: int
) -> None:
    """What m + b passes leave is what decoding goes on from, in a batch with a short prompt too.

    The short one has no more rows than passes, so it is exact; more passes make the long one so.
    """
    model = shared("llama", kv_of, forward_passes=forward, backward_passes=1)
    twin, prompts, new = slow(model.decoder), [ids(9).tolist(), ids(2).tolist()], ids(2, 3)
    row, valid = left_pad(prompts, torch.device("cpu"))

    def run(apply: dict[str, Any]) -> Tensor:
        session = model.start(row, valid, new_tokens=3, apply=resolve(apply))
        return torch.stack([session.logits, *(session.step(token) for token in new.T)], 1)

    with torch.no_grad():
        encoded, rows = twin.passes(torch.tensor(prompts[0]), forward, 1)
        iterated = torch.cat((encoded[-1:], twin.exact(new[0], rows)))
        converged = [
            twin.exact(torch.cat((torch.tensor(prompt), new[sample])))[-4:]
            for sample, prompt in enumerate(prompts)
        ]
    found, often = run({}), run({"prefill": {"passes": 9}})
    torch.testing.assert_close(found[0], iterated, **CLOSE)
    torch.testing.assert_close(found[1], converged[1], **CLOSE)
    torch.testing.assert_close(often, torch.stack(converged), **CLOSE)
    assert (found[0] - converged[0]).abs().max() > 1e-3


def test_a_sequential_model_reads_a_prompt_row_by_row(shared: Make, ids: Ids) -> None:
    """As it was trained; a number of passes that is asked for stands in for that."""
    kv_of = (0, 4, 4, 4, 4, 5)
    model = shared("llama", kv_of, sequential=True, forward_passes=1, backward_passes=1)
    prompts = [ids(9).tolist(), ids(4).tolist()]
    row, valid = left_pad(prompts, torch.device("cpu"))
    twin = shared("llama", kv_of, forward_passes=1, backward_passes=1)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = model.start(row, valid, new_tokens=1)
        two = model.start(row, valid, new_tokens=1, apply=resolve({"prefill": {"passes": 2}}))
        passes = twin.start(row, valid, new_tokens=1)
        for sample, prompt in enumerate(prompts):
            text = torch.tensor([[*prompt, 7, 1]])
            exact = model.predictions(text)[0][0]
            torch.testing.assert_close(found.logits[sample], exact[len(prompt)], **CLOSE)
        torch.testing.assert_close(two.logits, passes.logits)
        assert (two.logits - found.logits).abs().max() > 1e-3
        two_scored = model(text, apply=resolve({"prefill": {"passes": 2}})).nll
        torch.testing.assert_close(two_scored, twin(text).nll)
        after = found.step(torch.tensor([7, 7]))
        torch.testing.assert_close(after[1], exact[len(prompt) + 1], **CLOSE)


def rows_seen(model: TokenModel) -> list[int]:
    """Count the rows that each layer's feed-forward meets, pass after pass."""
    seen: list[int] = []
    for layer in model.decoder.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, out: seen.append(out.shape[1]))
    return seen


EARLY = {
    "pizza-bottom": ((0, 1, 2, 2, 2, 2), {}),
    "windows-below": ((0, 1, 2, 2, 2, 2), {"windows": (3, 2, None, 3, None, 2)}),
    "strict": ((0, 1, 2, 2, 2, 2), {"strict": True}),
    "after-passes": ((0, 2, 2, 3, 3, 0), {}),
    "the-exit-reads-below": ((0, 1, 0, 2, 1, 2), {}),
    "own": ((0, 1, 2, 3, 4, 5), {}),
}


IN_CACHE = {"streaming_llm": {"positions": "cache"}, "uniform": {"tokens": 6}}


@pytest.mark.parametrize(
    "apply", [{}, {"sliding_window": {"window": 3}}, IN_CACHE], ids=["full", "window", "in cache"]
)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("name", EARLY)
def test_early_exit_changes_nothing(
    shared: Make, ids: Ids, name: str, family_name: str, padded: bool, apply: dict[str, Any]
) -> None:
    """Neither the prompt's last logits nor any later ones; the upper layers see one row."""
    kv_of, rest = EARLY[name]
    model = shared(family_name, kv_of, forward_passes=2, backward_passes=1, **rest)
    row, new = ids(2, 7), ids(2, 4)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, :5] = False
    seen = rows_seen(model)
    found = {}
    for early in (True, False):
        seen.clear()
        method = resolve({**apply, "prefill": {"early_exit": early}})
        session = model.start(row, valid if padded else None, new_tokens=4, apply=method)
        last = max(kv_of)
        assert seen[-(6 - last) :] == [1 if early else 7] * (6 - last)
        assert set(seen[: -(6 - last)]) == {7}
        steps = [session.logits, *(session.step(token) for token in new.T)]
        found[early] = torch.stack(steps, 1)
    torch.testing.assert_close(found[True], found[False], **CLOSE)


def test_a_prompt_leaves_out_what_nothing_reads(shared: Make, ids: Ids) -> None:
    """Unasked, where layers lie above the last KV layer; never where every layer is one."""
    for kv_of, last in (((0, 1, 1, 1), 1), ((0, 1, 2, 3), 7), ((0, 3, 3, 3), 7)):
        model = shared("llama", kv_of)
        seen = rows_seen(model)
        model.start(ids(1, 7), new_tokens=1)
        assert seen[-1] == last
    assert model.start(ids(1, 7), new_tokens=1, apply=resolve({"prefill": {"early_exit": False}}))
    with pytest.raises(KvlabError, match="early_exit"):
        model.start(ids(1, 7), new_tokens=1, apply=resolve({"prefill": {"early_exit": True}}))


@pytest.mark.parametrize("window", [None, 3])
def test_scoring_reads_what_a_live_cache_would_keep(
    shared: Make, slow: Twin, kv_of: KvOf, window: int | None
) -> None:
    model = shared("llama", kv_of, windows=WINDOWS, forward_passes=1, backward_passes=1)
    twin = slow(model.decoder, window)
    apply = resolve({} if window is None else {"sliding_window": {"window": window}})
    with torch.no_grad():
        found = model(TEXT, apply=apply).nll[0, 1:]
        logits, _ = twin.passes(TEXT[0], 1, 1)
        expected = nn.functional.cross_entropy(logits[:-1], TEXT[0, 1:], reduction="none")
        torch.testing.assert_close(found, expected, **CLOSE)
        often = resolve({**({"sliding_window": {"window": 3}} if window else {}),
                         "prefill": {"passes": 12}})  # fmt: skip
        found = model(TEXT, apply=often).nll[0, 1:]
        expected = nn.functional.cross_entropy(
            twin.exact(TEXT[0])[:-1], TEXT[0, 1:], reduction="none"
        )
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    ("written", "error"),
    [
        ({"h2o": {}}, "a share in uniform is of a prompt"),
        ({"streaming_llm": {}, "pyramidkv": {}}, "a share in pyramidkv is of a prompt"),
        ({"snapkv": {"window": 2}, "uniform": {"tokens": 8}}, "snapkv cuts a prompt"),
        ({"h2o": {}, "squeeze_attention": {"tokens": 8}}, "squeeze_attention measures a prompt"),
        ({"h2o": {}, "uniform": {"tokens": 8}}, None),
        ({"sliding_window": {"window": 5}}, None),
        ({"full_attention": {}}, None),
    ],
)
def test_where_rows_come_one_by_one_no_prompt_is_cut(
    shared: Make, ids: Ids, written: dict[str, Any], error: str | None
) -> None:
    model = shared("llama", (0, 4, 4, 4, 4, 5), sequential=True)
    text = ids(1, 12)
    if error is None:
        model.start(text, new_tokens=1, apply=resolve(written))
    else:
        with pytest.raises(MethodError, match=error) as raised:
            model.start(text, new_tokens=1, apply=resolve(written))
        assert "\n" not in str(raised.value)
    model.start(text, new_tokens=1, apply=resolve({**written, "prefill": {"passes": 3}}))
