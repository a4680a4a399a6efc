"""Generation over a cache of the KV layers alone gives what one token after another gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kvlab import KvlabError
from kvlab.kernels.attention import EMPTY
from kvlab.methods.axis import resolve
from kvlab.methods.block_transformer.model import BlockTransformer
from kvlab.methods.build import build
from kvlab.methods.cache.interface import Cache, Extra, Keys, Step
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.decoder.config import DecoderConfig, Sharing, gpt_neox, llama
from kvlab.methods.decoder.generation import generate, left_pad
from kvlab.methods.decoder.language_model import TokenModel, positions_of
from kvlab.methods.decoder.model import Decoder

Make = Callable[..., TokenModel]
Ids = Callable[..., Tensor]
Twin = Callable[..., Any]

MAPS = {
    "pizza-bottom": (0, 1, 2, 2, 2, 2),
    "pizza-top": (0, 1, 5, 5, 5, 5),
    "sandwich-middle": (0, 3, 3, 3, 3, 5),
    "sandwich-top": (0, 4, 4, 4, 4, 5),
    "lasagna-bottom": (0, 0, 2, 2, 4, 4),
    "lasagna-middle": (1, 1, 1, 4, 4, 4),
    "crossing": (2, 3, 2, 5, 0, 1),
}
WINDOWS = (3, None, 3, 3, 2, 3)
FAMILIES = ["llama", "qwen3", "neox"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
DEVICE = torch.device("cpu")
TEXT = torch.tensor(
    [[11, 3, 41, 3, 0, 27, 52, 8, 8, 30, 19, 5], [7, 50, 2, 2, 33, 4, 1, 9, 46, 0, 12, 13]]
)


def shared(make: Make, family: str, kv_of: tuple[int, ...], **rest: Any) -> TokenModel:
    windows = {"windows": rest.pop("windows")} if "windows" in rest else {}
    return make(family, layers=len(kv_of), sharing=Sharing(kv_of, **rest), **windows).double()


def cache_of(decoder: Decoder, rows: int, apply: dict[str, Any] | None = None) -> Cache:
    return open_cache(
        decoder.config, resolve(apply or {}), batch=2, tokens=rows, device=DEVICE,
        dtype=torch.float64,
    )  # fmt: skip


def read(
    decoder: Decoder,
    ids: Tensor,
    cache: Cache,
    chunks: tuple[int, ...],
    valid: Tensor | None = None,
    bare: bool = False,
) -> Tensor:
    """Logits [B, T, V] of a text that is given in chunks; `bare`: the first without positions."""
    positions = positions_of(torch.ones_like(ids, dtype=torch.bool) if valid is None else valid)
    assert positions is not None
    pieces = zip(ids.split(chunks, 1), positions.split(chunks, 1), strict=True)
    hidden = [
        decoder.body(decoder.embed(some), None if bare and not i else where, cache, some)
        for i, (some, where) in enumerate(pieces)
    ]
    return decoder.head(torch.cat(hidden, 1))


def exact(twin: Any, ids: Tensor) -> Tensor:
    """Logits [B, T, V], each sample by itself."""
    return torch.stack([twin.exact(sample) for sample in ids])


class Scattered(Cache):
    """Keeps every row, and hands each layer's out in an order of its own, empty ones among them."""

    def __init__(self) -> None:
        self.rows: dict[int, Keys] = {}
        self.fresh: dict[int, Keys] = {}
        self.observed: list[int] = []

    def plan(self, step: Step) -> Extra | None:
        self.observed.clear()
        return None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        if positions is None:
            positions = torch.arange(k.shape[2]).expand(len(k), -1)
        self.fresh[layer] = Keys(k, v, positions)

    def read(self, layer: int) -> Keys | None:
        joined = self.joined(layer)
        if joined is None:
            return None
        k, v, positions = joined
        assert positions is not None
        order = torch.randperm(k.shape[2] + 2)
        poison = torch.full_like(k[:, :, :1], 1e3).expand(-1, -1, 2, -1)
        padded = nn.functional.pad(positions, (0, 2), value=EMPTY)
        return Keys(
            torch.cat((k, poison), 2)[:, :, order],
            torch.cat((v, poison), 2)[:, :, order],
            padded[:, order],
        )

    def joined(self, layer: int) -> Keys | None:
        parts = [some[layer] for some in (self.rows, self.fresh) if layer in some]
        if len(parts) < 2:
            return parts[0] if parts else None
        past, new = parts
        assert past.positions is not None
        assert new.positions is not None
        return Keys(
            torch.cat((past.k, new.k), 2),
            torch.cat((past.v, new.v), 2),
            torch.cat((past.positions, new.positions), 1),
        )

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        self.observed.append(layer)

    def finish(self) -> None:
        for layer in self.fresh:
            joined = self.joined(layer)
            assert joined is not None
            self.rows[layer] = joined
        self.fresh.clear()

    def nbytes(self) -> int:
        return 0


@st.composite
def maps(draw: st.DrawFn) -> tuple[int, ...]:
    """Any map at all of two to five layers."""
    layers = draw(st.integers(2, 5))
    return tuple(draw(st.integers(0, layers - 1)) for _ in range(layers))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, ...]:
    """Chunks of one to five rows that make up twelve."""
    chunks: list[int] = []
    while (left := 12 - sum(chunks)) > 0:
        chunks.append(draw(st.integers(1, min(5, left))))
    return tuple(chunks)


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("kind", ["slots", "window", "scattered"])
@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(kv_of=maps(), chunks=cuts(), strict=st.booleans(), bare=st.booleans())
def test_any_map_in_any_chunks(
    tiny: Make,
    slow: Twin,
    family_name: str,
    kind: str,
    kv_of: tuple[int, ...],
    chunks: tuple[int, ...],
    strict: bool,
    bare: bool,
) -> None:
    """As many passes as a chunk has rows: whatever is fed comes out exact.

    "window": what leaves the ring is gone, also where a chunk pushes out what it still reads.
    """
    decoder = shared(tiny, family_name, kv_of, strict=strict, forward_passes=4).decoder
    window = 3 if kind == "window" else None
    cache = {
        "slots": lambda: cache_of(decoder, 12),
        "window": lambda: cache_of(decoder, 12, {"sliding_window": {"window": 3}}),
        "scattered": Scattered,
    }[kind]()
    with torch.inference_mode():
        expected = exact(slow(decoder, window), TEXT)
        found = read(decoder, TEXT, cache, chunks, bare=bare)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("chunks", [(1,) * 12, (7, 1, 1, 1, 1, 1), (3, 2, 1, 4, 1, 1)])
@pytest.mark.parametrize("name", MAPS)
def test_windows_of_the_model_and_of_the_cache(
    tiny: Make, slow: Twin, name: str, chunks: tuple[int, ...]
) -> None:
    """Layers with other windows read one KV layer: its ring is as long as the longest."""
    decoder = shared(tiny, "llama", MAPS[name], windows=WINDOWS, forward_passes=9).decoder
    for window, apply in ((None, {}), (4, {"sliding_window": {"window": 4}})):
        with torch.inference_mode():
            expected = exact(slow(decoder, window), TEXT)
            found = read(decoder, TEXT, cache_of(decoder, 12, apply), chunks, bare=True)
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("apply", [{}, {"sliding_window": {"window": 3}}], ids=["full", "window"])
@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("name", MAPS)
def test_prompts_of_unequal_length(
    tiny: Make, ids: Ids, slow: Twin, name: str, family_name: str, apply: dict[str, Any]
) -> None:
    """Left-padded prompts continue as each would alone, token by token from its first."""
    model = shared(tiny, family_name, MAPS[name], windows=WINDOWS)
    twin = slow(model.decoder, 3 if apply else None)
    prompts, new = [ids(n).tolist() for n in (7, 1, 4)], ids(3, 5)
    row, valid = left_pad(prompts, DEVICE)
    session = model.start(row, valid, new_tokens=5, apply=resolve(apply))
    seen = torch.stack([session.logits, *(session.step(token) for token in new.T)], 1)
    with torch.no_grad():
        for sample, prompt in enumerate(prompts):
            alone = twin.exact(torch.cat((torch.tensor(prompt), new[sample])))
            torch.testing.assert_close(seen[sample], alone[len(prompt) - 1 :], **CLOSE)


@pytest.mark.parametrize("name", MAPS)
def test_turns_of_unequal_length(tiny: Make, slow: Twin, name: str) -> None:
    """A second turn of several rows, padded on the left too, over a cache that holds the first."""
    decoder = shared(tiny, "llama", MAPS[name], forward_passes=5).decoder
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, :2] = valid[1, 6:9] = False
    with torch.inference_mode():
        found = read(decoder, TEXT, cache_of(decoder, 12), (6, 5, 1), valid)
        for sample in range(2):
            alone = slow(decoder).exact(TEXT[sample, valid[sample]])
            torch.testing.assert_close(found[sample, valid[sample]], alone, **CLOSE)


@pytest.mark.parametrize("forward", [1, 3])
@pytest.mark.parametrize("name", ["sandwich-top", "lasagna-middle", "crossing"])
def test_a_prompt_is_encoded_in_passes(
    tiny: Make, ids: Ids, slow: Twin, name: str, forward: int
) -> None:
    """What m + b passes leave is what decoding goes on from, in a batch with a short prompt too.

    The short one has no more rows than passes, so it is exact; more passes make the long one so.
    """
    model = shared(tiny, "llama", MAPS[name], forward_passes=forward, backward_passes=1)
    twin, prompts, new = slow(model.decoder), [ids(9).tolist(), ids(2).tolist()], ids(2, 3)
    row, valid = left_pad(prompts, DEVICE)

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


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("family_name", ["llama", "neox"])
def test_a_batch_is_its_prompts_one_by_one(
    tiny: Make, ids: Ids, name: str, family_name: str
) -> None:
    model = shared(tiny, family_name, MAPS[name], forward_passes=2, backward_passes=1)
    prompts = [ids(n).tolist() for n in (1, 9, 4, 6)]
    together = generate(model, prompts, 8)
    assert together == [generate(model, [prompt], 8)[0] for prompt in prompts]


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


@pytest.mark.parametrize("apply", [{}, {"sliding_window": {"window": 3}}], ids=["full", "window"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("name", EARLY)
def test_early_exit_changes_nothing(
    tiny: Make, ids: Ids, name: str, family_name: str, padded: bool, apply: dict[str, Any]
) -> None:
    """Neither the prompt's last logits nor any later ones; the upper layers see one row."""
    kv_of, rest = EARLY[name]
    model = shared(tiny, family_name, kv_of, forward_passes=2, backward_passes=1, **rest)
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


def test_a_prompt_leaves_out_what_nothing_reads(tiny: Make, ids: Ids) -> None:
    """Unasked, where layers lie above the last KV layer; never where every layer is one."""
    for kv_of, last in (((0, 1, 1, 1), 1), ((0, 1, 2, 3), 7), ((0, 3, 3, 3), 7)):
        model = shared(tiny, "llama", kv_of)
        seen = rows_seen(model)
        model.start(ids(1, 7), new_tokens=1)
        assert seen[-1] == last
    assert model.start(ids(1, 7), new_tokens=1, apply=resolve({"prefill": {"early_exit": False}}))
    with pytest.raises(KvlabError, match="early_exit"):
        model.start(ids(1, 7), new_tokens=1, apply=resolve({"prefill": {"early_exit": True}}))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", MAPS)
def test_scoring_reads_what_a_live_cache_would_keep(
    tiny: Make, slow: Twin, name: str, window: int | None
) -> None:
    model = shared(tiny, "llama", MAPS[name], windows=WINDOWS, forward_passes=1, backward_passes=1)
    twin = slow(model.decoder, window)
    apply = resolve({} if window is None else {"sliding_window": {"window": window}})
    with torch.no_grad():
        found = model(TEXT[:1], apply=apply).nll[0, 1:]
        logits, _ = twin.passes(TEXT[0], 1, 1)
        expected = nn.functional.cross_entropy(logits[:-1], TEXT[0, 1:], reduction="none")
        torch.testing.assert_close(found, expected, **CLOSE)
        often = resolve({**({"sliding_window": {"window": 3}} if window else {}),
                         "prefill": {"passes": 12}})  # fmt: skip
        found = model(TEXT[:1], apply=often).nll[0, 1:]
        expected = nn.functional.cross_entropy(
            twin.exact(TEXT[0])[:-1], TEXT[0, 1:], reduction="none"
        )
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", MAPS)
def test_bytes_are_those_of_the_kv_layers(tiny: Make, ids: Ids, name: str) -> None:
    for windows in (None, WINDOWS):
        model = shared(tiny, "llama", MAPS[name], **({"windows": windows} if windows else {}))
        c = model.config
        session = model.start(ids(3, 6), new_tokens=14)
        before = session.kv_bytes()
        for _ in range(14):
            session.step(ids(3))
        assert session.kv_bytes() == before
        reach = {
            kv: max(20 if windows is None else windows[i] or 20
                    for i, read_layer in enumerate(MAPS[name]) if read_layer == kv)
            for kv in MAPS[name]
        }  # fmt: skip
        row = 2 * c.kv_heads * c.head_dim * 8
        tables = 8 * sum(set(reach.values()))
        assert before == 3 * (sum(reach.values()) * row + tables)


@pytest.mark.parametrize("name", MAPS)
def test_the_order_of_observations(tiny: Make, name: str) -> None:
    """A cache sees each layer once a pass, in order, however often the layer is run."""
    decoder, cache = shared(tiny, "llama", MAPS[name]).decoder, Scattered()
    for chunk in (TEXT[:, :7], TEXT[:, 7:8]):
        positions = torch.arange(chunk.shape[1]).expand(chunk.shape)
        with torch.inference_mode():
            decoder.body(decoder.embed(chunk), positions, cache, chunk)
        assert cache.observed == list(range(6))


@pytest.mark.parametrize("name", MAPS)
def test_a_step_never_waits_for_the_device(tiny: Make, ids: Ids, name: str) -> None:
    """On the meta device reading a value is an error, so a step that runs there reads none."""
    model = shared(tiny, "llama", MAPS[name]).to("meta")
    session = model.start(ids(2, 5).to("meta"), new_tokens=4)
    for _ in range(4):
        logits = session.step(torch.empty(2, dtype=torch.long, device="meta"))
    assert logits.shape == (2, model.config.vocab_size)


SIZES = {
    "neox": gpt_neox(40, 8, 5),
    "llama": llama(40, 8, 10, 5, 96, head_dim=8, tie_embeddings=True),
}


@pytest.mark.parametrize("family_name", SIZES)
@pytest.mark.parametrize(
    "layers", [(0, 1, 1, 1), (3, 3, 3, 3), (0, 2, 2, 3), (1, 1, 3, 3)], ids=str
)
def test_sharing_inside_a_block_decoder(
    ids: Ids, family_name: str, layers: tuple[int, ...]
) -> None:
    """Generation is the parallel pass, as many passes as the prompts have blocks and more."""
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=53, init_std=0.3, **SIZES[family_name])
    model = (
        build(config, resolve({"cross_layer": {"layers": layers}, "block_transformer": {}}))
        .eval()
        .double()
    )
    assert isinstance(model, BlockTransformer)
    assert model.block_decoder.config.kv_of == layers
    assert model.token_decoder.decoder.config.sharing is None
    prompts = [ids(n).tolist() for n in (1, 13, 4, 18)]
    greedy = generate(model, prompts, 9)
    assert greedy == [generate(model, [prompt], 9)[0] for prompt in prompts]
    for prompt, new in zip(prompts, greedy, strict=True):
        pads = -len(prompt) % 4
        row = torch.tensor([[0] * pads + prompt + new])
        with torch.no_grad():
            parallel = model.logits(row, torch.arange(row.shape[1])[None] >= pads)
        first = pads + len(prompt) - 4
        assert parallel.flatten(1, 2)[0, first : first + 9].argmax(-1).tolist() == new
    session = model.start(ids(2, 16), new_tokens=8)
    c = model.block_decoder.config
    row_bytes = 2 * c.kv_heads * c.head_dim * 8
    blocks = 6 * (len(set(layers)) * row_bytes + 8)
    assert session.kv_bytes() - model.token_decoder.open(2).nbytes() == 2 * blocks


def test_a_method_builds_the_same_decoder(ids: Ids) -> None:
    """A map written as a method and one written into the config are the same model."""
    config = DecoderConfig(vocab_size=53, init_std=0.3, **llama(32, 6, 4, 2, 48))
    kv_of = MAPS["sandwich-top"]
    for params in ({"layers": kv_of}, {"layout": "sandwich_top", "kv_layers": 3}):
        torch.manual_seed(0)
        by_method = build(config, resolve({"cross_layer": params}))
        torch.manual_seed(0)
        by_config = build(config.with_(sharing=Sharing(kv_of)), resolve({}))
        text = ids(2, 12)
        with torch.no_grad():
            assert torch.equal(by_method(text).nll, by_config(text).nll)
        assert by_method.config == config
        assert by_method.acting.kv_of == kv_of
