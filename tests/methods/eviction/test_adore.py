"""ADORE against theorems, and against a slow twin that keeps its sets in plain Python."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.attention import EMPTY
from kvlab.methods.build import build
from kvlab.methods.cache.interface import Extra, Step
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.eviction.adore.cache import AdoreCache
from kvlab.methods.eviction.adore.controller import Controller, buckets, load
from kvlab.methods.eviction.adore.ranking import Adore
from kvlab.methods.eviction.adore.scores import Fresh, Scores
from kvlab.methods.eviction.adore.sizes import ControllerConfig
from kvlab.methods.registry import MethodError, resolve

VOCABULARY, WIDTH = 53, 32
LENGTHS = (24, 17, 11)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"rebuild": 0},
    {"readmit": True},
    {"refresh": 3},
    {"every": 2},
    {"threshold": 0.5},
    {"rebuild": 6, "context": 2},
    {"source": "offload", "rebuild": 3},
    {"per": "layer"},
    {"per": "layer", "readmit": True, "refresh": 3},
    {"per": "layer", "source": "offload", "rebuild": 3},
    {"per": "layer", "scores": "rule"},
]


@pytest.fixture(scope="module")
def model() -> TokenModel:
    torch.manual_seed(0)
    made = build(DecoderConfig(VOCABULARY, **llama(WIDTH, 3, 4, 2, 48)), resolve({}))
    assert isinstance(made, TokenModel)
    return made.double().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Controllers whose scores differ widely from token to token, per model and per layer."""
    made = tmp_path_factory.mktemp("controllers")
    for per, layers in (("model", 1), ("layer", 3)):
        torch.manual_seed(1)
        config = ControllerConfig(VOCABULARY, WIDTH, hidden=16, match=8, layers=layers)
        controller = Controller(config)
        for parameter in controller.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        (made / per).mkdir()
        controller.save(made / per)
    return made


def adore(folder: Path, **settings: Any) -> dict[str, Any]:
    """Settings of adore, with the controller that they need."""
    if settings.get("scores") == "rule":
        return settings
    return {"controller": str(folder / settings.get("per", "model")), **settings}


def prompts() -> tuple[Tensor, Tensor, Tensor]:
    """Ids [3, 24] left-padded, valid, and what comes after them [12, 3]."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (3, LENGTHS[0]), generator=draw)
    valid = torch.arange(LENGTHS[0]) >= LENGTHS[0] - torch.tensor(LENGTHS)[:, None]
    return ids, valid, torch.randint(0, VOCABULARY, (12, 3), generator=draw)


def generated(model: TokenModel, apply: dict[str, Any] | None, rows: slice = slice(None)) -> Tensor:
    """Logits [13, B, V] after each token, a turn of three rows among them."""
    ids, valid, more = prompts()
    ids, valid, more = ids[rows], valid[rows], more[:, rows]
    if len(ids) == 1:
        ids, valid = ids[valid][None], valid[valid][None]
    session = model.start(ids, valid, new_tokens=16, apply=resolve(apply) if apply else None)
    out = [session.logits]
    for number, tokens in enumerate(more):
        out.append(session.step(tokens))
        if number == 5:
            out.append(session.extend(more[:3].T))
    return torch.stack(out)


@pytest.mark.parametrize("per", ["model", "layer"])
@pytest.mark.parametrize("source", ["recompute", "offload"])
@pytest.mark.parametrize("scores", ["controller", "rule"])
@pytest.mark.parametrize("sizes", [(100, 4), (6, 60)])
def test_what_covers_the_text_is_full_attention(
    model: TokenModel, folder: Path, scores: str, source: str, sizes: tuple[int, int], per: str
) -> None:
    """Where all rows are kept; and where all that were released are rebuilt, each on its prefix."""
    kept, rebuild = sizes
    settings = adore(folder, rebuild=rebuild, scores=scores, source=source, per=per)
    found = generated(model, {"adore": settings, "uniform": {"tokens": kept}})
    torch.testing.assert_close(found, generated(model, None), atol=1e-7, rtol=0)


def test_what_does_not_cover_it_is_not(model: TokenModel, folder: Path) -> None:
    apply = {"adore": adore(folder, rebuild=4), "uniform": {"tokens": 6}}
    assert (generated(model, apply) - generated(model, None)).abs().max() > 1e-3


@pytest.mark.parametrize("budget", ["uniform", "squeeze_attention"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_batch_is_its_singles(
    model: TokenModel, folder: Path, variant: dict[str, Any], budget: str
) -> None:
    apply = {"adore": adore(folder, **variant), budget: {"tokens": 8}}
    found = generated(model, apply)
    for i in range(3):
        alone = generated(model, apply, slice(i, i + 1))
        torch.testing.assert_close(found[:, i : i + 1], alone, atol=1e-7, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_saved_in_mid_generation_it_goes_on_alike(
    model: TokenModel, folder: Path, variant: dict[str, Any]
) -> None:
    method = resolve({"adore": adore(folder, **variant), "uniform": {"tokens": 8}})
    ids, _, more = prompts()
    first = model.start(ids, new_tokens=12, apply=method)
    second = model.start(more[:2].T, new_tokens=34, apply=method)
    assert second._cache.state().keys() == first._cache.state().keys()
    with torch.no_grad():
        for tokens in more[:5]:
            first.step(tokens)
        sizes = {"batch": 3, "tokens": 36, "device": torch.device("cpu"), "dtype": torch.float64}
        second._cache = open_cache(model.config, method, **sizes)
        second._cache.restore(first._cache.state())
        second._next = first._next.clone()
        for tokens in more[5:]:
            assert torch.equal(first.step(tokens), second.step(tokens))


class Recorded:
    """What each pass rebuilt, and what the cache held at its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rebuilt: list[set[int]] = []
        plan = AdoreCache.plan

        def watched(cache: AdoreCache, step: Step) -> Extra | None:
            extra = plan(cache, step)
            places = [] if extra is None else extra.positions[0].tolist()
            self.rebuilt.append({place for place in places if place != EMPTY})
            return extra

        monkeypatch.setattr(AdoreCache, "plan", watched)


@pytest.mark.parametrize("per", ["model", "layer"])
@pytest.mark.parametrize("context", [0, 1])
@pytest.mark.parametrize("readmit", [False, True])
def test_sets(
    model: TokenModel,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    readmit: bool,
    context: int,
    per: str,
) -> None:
    """Scores worked out from the whole text each time, and sets that are lists of places."""
    kept, rebuild, recent = 7, 4, 2
    settings = adore(
        folder, rebuild=rebuild, recent=recent, readmit=readmit, context=context, per=per
    )
    seen = Recorded(monkeypatch)
    ids, _, more = prompts()
    text = ids[0].tolist()
    method = resolve({"adore": settings, "uniform": {"tokens": kept}})
    session = model.start(ids[:1], new_tokens=12, apply=method)
    scores = scores_of(model, folder / per, text)
    held = [best(own, range(len(text)), kept, len(text) - 1, recent) for own in scores]
    assert held == at(session, per)
    for tokens in more[:, :1]:
        text.append(int(tokens))
        newest, scores = len(text) - 1, scores_of(model, folder / per, text)
        session.step(tokens)
        if len(held[0]) == kept + 1:
            held = [
                best(own, rows, kept, newest - 1, recent)
                for own, rows in zip(scores, held, strict=True)
            ]
        matters: dict[int, float] = {}  # where it was released
        for own, rows in zip(scores, held, strict=True):
            for p in set(range(newest)) - rows:
                matters[p] = max(matters.get(p, own[p]), own[p])
        first = sorted(matters, key=lambda p: -matters[p])[: rebuild // (context + 1)]
        again = {q for p in first for q in range(p - context, p + 1) if q in matters}
        held = [rows | {newest} for rows in held]
        assert seen.rebuilt[-1] == again
        if readmit:
            held = [
                best(own, rows | again, kept, newest, recent)
                for own, rows in zip(scores, held, strict=True)
            ]
        assert at(session, per) == held


def scores_of(model: TokenModel, folder: Path, text: list[int]) -> list[list[float]]:
    """What a controller says of every token for the last one, from the whole text; by layer."""
    controller = load(folder, torch.device("cpu"))
    ids = torch.tensor([text])
    with torch.no_grad():
        embedded = model.decoder.embed(ids)
        found = controller(embedded, torch.tensor([[len(text) - 1]]))
    return [[float(x) for x in own] for own in found[0, :, 0]]


def best(scores: list[float], among: Any, count: int, newest: int, recent: int) -> set[int]:
    ordered = sorted(among, key=lambda p: (p <= newest - recent, -scores[p]))
    return set(ordered[:count])


def at(session: Any, per: str = "model") -> list[set[int]]:
    """What is held, by what was scored alike."""
    places = [session._cache.held(layer).flatten().tolist() for layer in range(3)]
    held = [set(own) - {EMPTY} for own in places]
    if per == "layer":
        return held
    assert places[0] == places[1] == places[2]  # one selection for all layers
    return held[:1]


def test_between_refreshes_only_what_is_held_is_scored(model: TokenModel, folder: Path) -> None:
    """A turn scores all tokens anew; a step of its own only those that a layer holds."""
    ids, _, more = prompts()
    text = ids[0].tolist()
    method = resolve({"adore": adore(folder, refresh=50), "uniform": {"tokens": 8}})
    session = model.start(ids[:1], new_tokens=12, apply=method)
    for rows in (1, 1, 3, 1):
        turn = more[:rows, :1].T
        (before,) = at(session)
        text += turn[0].tolist()
        session.extend(turn) if rows > 1 else session.step(turn[0])
        known = session._cache.log.known[0, 0]
        (now,) = scores_of(model, folder / "model", text)
        right = {p for p in range(len(text)) if abs(float(known[p]) - now[p]) < 1e-5}
        # The first step is a refresh of itself.
        every = rows > 1 or len(text) == ids.shape[1] + 1
        assert right >= before
        assert (right == set(range(len(text)))) == every


class Oracle(Scores):
    """Says of every place what it is told."""

    told: Tensor

    def see(self, fresh: Fresh) -> None: ...

    def every(self, count: int, newest: Tensor) -> Tensor:
        return self.told[:count].expand(1, 1, -1)

    def of(self, layer: int, positions: Tensor, newest: Tensor) -> Tensor:
        return self.told[positions]

    def tensors(self) -> dict[str, Tensor]:
        return {}


def test_an_oracle_gets_its_set(model: TokenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(5)
    Oracle.told = torch.randperm(40, generator=draw).float()
    monkeypatch.setattr(Adore, "scores", lambda self, o: Oracle(o.batch, o.rows, 1, o.device))
    seen = Recorded(monkeypatch)
    ids, _, more = prompts()
    method = resolve({"adore": {"rebuild": 5, "recent": 1}, "uniform": {"tokens": 9}})
    session = model.start(ids[:1], new_tokens=4, apply=method)
    session.step(more[0, :1])
    ordered = sorted(range(23), key=lambda p: -float(Oracle.told[p]))
    assert at(session) == [{*ordered[:8], 23, 24}]
    assert seen.rebuilt[-1] == set(ordered[8:13])


def test_its_slots_do_not_grow_with_the_text(model: TokenModel, folder: Path) -> None:
    """Ids, scores and what scores are made of do, and are counted."""
    method = resolve({"adore": adore(folder), "uniform": {"tokens": 8}})
    sizes = []
    for tokens in (30, 130):
        session = model.start(torch.zeros(1, 20, dtype=torch.long), new_tokens=tokens, apply=method)
        sizes.append(session.kv_bytes())
    of_a_token = 4 + 4 + (16 + 8) * 8
    assert sizes[1] - sizes[0] == 100 * of_a_token
    weights = Controller(ControllerConfig(VOCABULARY, WIDTH, hidden=16, match=8)).nbytes()
    slots = 2 * 3 * 2 * 8 * 9 * 8 + 9 * 8 + 8
    assert sizes[0] == slots + weights + 51 * of_a_token + 16 * 4


class TestController:
    def test_token_by_token_it_scores_as_in_one_pass(self) -> None:
        torch.manual_seed(3)
        controller = Controller(ControllerConfig(VOCABULARY, WIDTH)).double().eval()
        embedded = torch.randn(2, 12, WIDTH, dtype=torch.float64)
        whole = controller.states(embedded)
        last = None
        for t in range(12):
            z = controller.states(embedded[:, t : t + 1], last)
            last = z[:, 0]
            torch.testing.assert_close(last, whole[:, t])

    @pytest.mark.parametrize("state", ["gru", "token"])
    @pytest.mark.parametrize("position", ["relative", "absolute", "none"])
    @pytest.mark.parametrize("match", [0, 8])
    @pytest.mark.parametrize("layers", [1, 3])
    def test_the_number_of_its_weights(
        self, state: Any, position: Any, match: int, layers: int
    ) -> None:
        config = ControllerConfig(VOCABULARY, WIDTH, state, 16, position, match, layers)
        held = sum(p.numel() for p in Controller(config).parameters())
        assert config.parameters == held

    def test_without_the_current_token_scores_stand_still(self) -> None:
        """Absolute positions and no comparison: a ranking that never changes."""
        torch.manual_seed(4)
        config = ControllerConfig(VOCABULARY, WIDTH, position="absolute", match=0)
        embedded = torch.randn(1, 12, WIDTH)
        found = Controller(config)(embedded, torch.tensor([[5, 11]]))
        assert torch.equal(found[0, 0, 0], found[0, 0, 1])
        moving = Controller(ControllerConfig(VOCABULARY, WIDTH))(embedded, torch.tensor([[5, 11]]))
        assert not torch.allclose(moving[0, 0, 0], moving[0, 0, 1])

    def test_buckets_grow_wider(self) -> None:
        found = buckets(torch.arange(2**21))
        assert found[:32].tolist() == list(range(32))
        assert int(found.max()) == 63
        steps = found.diff()
        assert set(steps.tolist()) == {0, 1}

    def test_a_broken_file_is_named(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(KvlabError, match="holds no ADORE controller"):
            load(tmp_path, torch.device("cpu"))
        config = (folder / "model" / "controller.json").read_bytes()
        (tmp_path / "controller.json").write_bytes(config)
        (tmp_path / "controller.safetensors").write_bytes(b"broken")
        with pytest.raises(KvlabError, match="is no whole ADORE controller"):
            load(tmp_path, torch.device("cpu"))


class TestRefused:
    def test_no_controller(self, model: TokenModel) -> None:
        with pytest.raises(KvlabError, match="needs a trained controller"):
            model.start(torch.zeros(1, 9, dtype=torch.long), new_tokens=1, apply=resolve("adore"))

    def test_a_controller_of_another_model(self, model: TokenModel, tmp_path: Path) -> None:
        Controller(ControllerConfig(VOCABULARY + 1, WIDTH)).save(tmp_path)
        method = resolve({"adore": {"controller": str(tmp_path)}})
        with pytest.raises(KvlabError, match="vocab_size 54 and width 32, this one has 53 and 32"):
            model.start(torch.zeros(1, 9, dtype=torch.long), new_tokens=1, apply=method)

    def test_a_controller_of_all_layers_for_each(self, model: TokenModel, folder: Path) -> None:
        method = resolve({"adore": {"controller": str(folder / "model"), "per": "layer"}})
        with pytest.raises(KvlabError, match="scores for 1 layers each, 3 are needed"):
            model.start(torch.zeros(1, 9, dtype=torch.long), new_tokens=1, apply=method)

    def test_fewer_rows_than_are_protected(self) -> None:
        with pytest.raises(
            MethodError, match="adore keeps at least 9 rows in every layer, found 8"
        ):
            resolve({"adore": {"scores": "rule", "recent": 8}, "uniform": {"tokens": 8}})

    @pytest.mark.parametrize(
        ("written", "message"),
        [
            ({"adore": {"rebuild": 4, "context": 4}}, "context: must be below rebuild"),
            ({"adore": {"rebuild": 0, "readmit": True}}, "rebuild: is 0"),
            ({"adore": {"scores": "rule", "threshold": 0.5}}, "threshold: attention"),
            ({"adore": {"scores": "rule", "controller": "x"}}, "controller: scores is 'rule'"),
            ({"adore": {}, "global_topk": {}}, "score"),
            ({"adore": {}, "block_transformer": {}}, "keeps blocks"),
        ],
    )
    def test_what_does_not_go_together(self, written: Any, message: str) -> None:
        assert any(re.search(message, problem) for problem in problems(written))


def problems(written: dict[str, Any]) -> list[str]:
    try:
        choice = resolve(written)["eviction"]
    except MethodError as error:
        return [str(error)]
    assert choice.value.check is not None
    return list(choice.value.check(choice.params, None))
