"""Divergence and recall under a cut cache, with a model that recalls perfectly by construction."""

import random

import pytest
import torch
import torch.nn.functional as F

from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import from_dict, resolve
from kvlab.methods.store import save
from kvlab.platform.data import corpus
from kvlab.platform.data.tokenizer import make
from kvlab.platform.jobs.context import JobError, Stopped
from kvlab.platform.jobs.evaluate.language import EnglishLanguage, language_of
from kvlab.platform.jobs.evaluate.prompts import Place, digest, prompts
from kvlab.platform.jobs.evaluate.windows import cut
from kvlab.platform.jobs.local import run_cell

SYMBOLS = {"keys": 8, "values": 8, "filler": 4}
VOCABULARY = 2 + sum(SYMBOLS.values())
LENGTH, PROMPT, GENERATE = 64, 32, 12
ASKED = {
    "tasks": ["passkey", "associative_recall"], "lengths": [32, 63], "depths": [0.0, 0.5, 1.0],
    "pairs": 4, "answer": 2, "samples": 5, "seed": 0,
}  # fmt: skip
SPEC = {
    "metrics": ["divergence", "recall", "multi_turn"], "apply": {}, "sequence_length": LENGTH,
    "tokens": 1000, "batch_size": 16, "first_target": 1, "dtype": "auto", "seed": 0,
    "divergence": {"prompt": PROMPT, "generate": GENERATE}, "recall": ASKED,
}  # fmt: skip
DATA = {
    "source": {
        "kind": "recall", "length": LENGTH - 1, "documents": 60, **SYMBOLS, "pairs": 4,
        "answer": 2, "seed": 0,
    },
    "format": "text", "tokenizer": {"recall": SYMBOLS}, "holdout": 0.3, "max_tokens": None,
}  # fmt: skip


def saved(model, folder):
    folder.mkdir()
    save(model, folder)
    return folder


@pytest.fixture(scope="module")
def symbols(tmp_path_factory):
    folder = tmp_path_factory.mktemp("symbols")
    run_cell("data", DATA, {}, folder)
    return folder


@pytest.fixture(scope="module")
def model(recaller, tmp_path_factory):
    return saved(recaller(VOCABULARY), tmp_path_factory.mktemp("models") / "recaller")


@pytest.fixture(scope="module")
def evaluate(symbols, model, tmp_path_factory):
    def run(apply=None, *, data=symbols, of=model, **changes):
        spec = {**SPEC, "apply": resolve(apply or {}).to_dict(), **changes}
        folder = tmp_path_factory.mktemp("result")
        found = run_cell("evaluate", spec, {"data": data, "of": of}, folder)
        return {name: part for name, part in found.items() if name != "environment"}

    return run


@pytest.fixture(scope="module")
def full(evaluate):
    return evaluate()


def accuracies(part, **where):
    return [
        cell["accuracy"]
        for cell in part["cells"]
        if all(cell[name] == value for name, value in where.items())
    ]


def test_the_full_cache_differs_from_itself_in_nothing(full):
    found = full["divergence"]
    assert found["kl"] == 0
    assert found["top1_agreement"] == 1
    assert found["identical_tokens"] == GENERATE
    assert found["loss"] == found["full_loss"]
    assert set(found["windows"]["kl"]) == {0.0}
    assert set(found["by_position"]["kl"]) <= {0.0, None}
    for part in (full["recall"], full["multi_turn"]):
        assert part["accuracy"] == part["full_accuracy"] == 1
        assert {cell["void"] for cell in part["cells"]} == {None}
        assert len(part["cells"]) == 2 * 2 * 3


def test_the_full_cache_is_not_run_beside_itself(evaluate, full, monkeypatch):
    starts = []
    start = TokenModel.start

    def counted(self, ids, *rest, **more):
        starts.append(more["apply"])
        return start(self, ids, *rest, **more)

    monkeypatch.setattr(TokenModel, "start", counted)
    found = evaluate(metrics=["divergence"], batch_size=1000)
    assert starts == [None]
    assert found["divergence"]["prompts"] == full["divergence"]["prompts"]


@pytest.mark.parametrize("apply", [
    {"sliding_window": {"window": 128}},
    {"h2o": {}, "uniform": {"tokens": 128}},
    {"streaming_llm": {"positions": "absolute"}, "uniform": {"tokens": 128}},
])  # fmt: skip
def test_a_budget_that_covers_the_text_changes_nothing(evaluate, full, apply):
    found = evaluate(apply)
    assert found["divergence"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["divergence"]["top1_agreement"] == 1
    assert found["divergence"]["identical_tokens"] == GENERATE
    assert found["recall"] == full["recall"]
    assert found["multi_turn"] == full["multi_turn"]


def test_divergence_equals_a_direct_computation(evaluate, symbols, recaller, full):
    """Against the same weights in a decoder whose own windows are those of the cache."""
    window, whole = 12, recaller(VOCABULARY)
    found = evaluate({"sliding_window": {"window": window}}, metrics=["divergence"])["divergence"]
    windowed = build(whole.config.with_(windows=(2, window)), resolve({}))
    windowed.load_state_dict(whole.state_dict())
    windows = cut(corpus.load(symbols, "heldout"), LENGTH, 1000, 1)
    kl, same, losses, numbers = [], [], [], []
    for number, ids in enumerate(windows.ids):
        places = windows.targets[number].nonzero()[:, 0]
        places = places[places >= PROMPT]
        if not len(places):
            continue
        with torch.no_grad():
            both = [m.predictions(ids[None])[0][0, places].double() for m in (whole, windowed)]
        p, q = (F.log_softmax(logits, -1) for logits in both)
        kl.append(F.kl_div(q, p, log_target=True, reduction="none").sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
        losses.append(-q.gather(1, ids[places, None])[:, 0])
        numbers.append(number)
    assert found["prompts"]["count"] == len(kl) > 5
    assert found["prompts"]["targets"] == sum(len(row) for row in kl)
    assert found["kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found["kl"] > 0.1
    assert found["top1_agreement"] == pytest.approx(float(torch.cat(same).mean()))
    assert found["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert found["full_loss"] == full["divergence"]["loss"]
    assert found["windows"]["kl"] == pytest.approx([float(row.mean()) for row in kl], rel=1e-3)
    assert found["windows"]["targets"] == [len(row) for row in kl]
    worst = max(range(len(kl)), key=lambda row: found["windows"]["kl"][row])
    assert found["worst_windows"][0]["window"] == numbers[worst]
    assert found["worst_windows"][0]["kl"] == found["windows"]["kl"][worst]
    assert len(found["by_position"]["kl"]) == LENGTH - PROMPT


def test_identical_tokens_end_at_the_first_difference(evaluate, symbols, recaller):
    method = from_dict({"eviction": {"sliding_window": {"window": 12}}})
    found = evaluate({"sliding_window": {"window": 12}}, metrics=["divergence"])["divergence"]
    windows = cut(corpus.load(symbols, "heldout"), LENGTH, 1000, 1)
    chosen = windows.targets[:, PROMPT:].any(1)
    expected = []
    for ids in windows.ids[chosen]:
        said = []
        for apply in (None, method):
            session = recaller(VOCABULARY).start(
                ids[None, :PROMPT], new_tokens=GENERATE, apply=apply
            )
            tokens = [int(session.logits.argmax())]
            while len(tokens) < GENERATE:
                tokens.append(int(session.step(torch.tensor(tokens[-1:])).argmax()))
            said.append(tokens)
        pairs = list(zip(*said, strict=True))
        expected.append(next((i for i, (a, b) in enumerate(pairs) if a != b), GENERATE))
    assert found["windows"]["identical_tokens"] == expected
    assert 0 < found["identical_tokens"] < GENERATE


def test_a_window_shorter_than_the_way_to_a_fact_loses_it(evaluate):
    found = evaluate({"sliding_window": {"window": 20}})
    for part in (found["recall"], found["multi_turn"]):
        assert part["full_accuracy"] == 1
        assert accuracies(part, task="passkey", depth=1.0) == [1.0, 1.0]
        assert accuracies(part, task="passkey", depth=0.0) == [0.0, 0.0]
        assert accuracies(part, task="passkey", depth=0.5) == [1.0, 0.0]
        assert part["accuracy"] == pytest.approx(sum(part["answers"]) / len(part["answers"]))


def test_a_cut_that_the_question_guides_misses_what_is_asked_after_it(evaluate):
    found = evaluate({"snapkv": {"window": 2, "kernel": 3}, "uniform": {"tokens": 12}})
    assert found["recall"]["accuracy"] > 0.9
    assert found["multi_turn"]["accuracy"] < 0.6


def test_a_cell_that_the_full_cache_cannot_answer_is_void(evaluate, recaller, tmp_path):
    # The model itself reads 24 rows: nothing deeper can be asked of any cache of it.
    short = recaller(VOCABULARY)
    near = build(short.config.with_(windows=(2, 24)), resolve({}))
    near.load_state_dict(short.state_dict())
    part = evaluate(of=saved(near, tmp_path / "near"))["recall"]
    void = [cell for cell in part["cells"] if cell["void"]]
    assert 0 < len(void) < len(part["cells"])
    assert all(cell["full_accuracy"] < 0.95 for cell in void)
    assert "the full cache answers 0%, under 95%" in {cell["void"] for cell in void}
    stand = len(part["cells"]) - len(void)
    assert part["prompts"]["count"] == len(part["answers"]) == stand * ASKED["samples"]
    assert part["accuracy"] == 1


def test_a_model_that_knows_nothing_has_no_recall(evaluate, full, tmp_path):
    config = DecoderConfig(VOCABULARY, 16, 1, 1, 1, 16, 16)
    part = evaluate(of=saved(build(config, resolve({})), tmp_path / "blank"))["recall"]
    assert part["accuracy"] is part["full_accuracy"] is None
    assert all(cell["void"] for cell in part["cells"])
    assert part["answers"] == []
    assert part["prompts"]["hash"] != full["recall"]["prompts"]["hash"]


def test_results_repeat_and_do_not_depend_on_the_batch(evaluate):
    apply = {"h2o": {}, "uniform": {"tokens": 14}}
    one, again, small = evaluate(apply), evaluate(apply), evaluate(apply, batch_size=3)
    assert one == again
    for name in ("recall", "multi_turn"):
        assert small[name] == one[name]
    first, second = one["divergence"], small["divergence"]
    assert first["prompts"] == second["prompts"]
    assert first["windows"]["identical_tokens"] == second["windows"]["identical_tokens"]
    assert second["windows"]["kl"] == pytest.approx(first["windows"]["kl"], rel=1e-4, abs=1e-6)


def test_prompts_are_as_long_and_as_deep_as_asked(symbols):
    language = language_of(symbols, ASKED["answer"])
    asked = prompts(ASKED, language)
    assert len(asked) == 2 * 2 * 3 * 5
    for prompt in asked:
        place = prompt.place
        assert len(prompt.context) + len(prompt.question) == place.length
        (key,) = prompt.question
        assert prompt.context.count(key) == 1
        at = prompt.context.index(key)
        assert prompt.context[at + 1 : at + 3] == prompt.answer
        # Of four facts one is asked for that stands near the depth.
        depth = place.depth if place.task == "passkey" else round(3 * place.depth) / 3
        assert at == pytest.approx(depth * (place.length - 4), abs=4)
    assert digest(asked) == digest(prompts(ASKED, language))
    assert digest(asked) != digest(prompts({**ASKED, "seed": 1}, language))


def test_questions_in_english_are_in_the_tokens_of_the_tokenizer():
    coder = make({"bytes": True}, ())
    language = EnglishLanguage(coder)
    asked = prompts({**ASKED, "lengths": [400], "samples": 2}, language)
    for prompt in asked:
        assert len(prompt.context) + len(prompt.question) == 400
        text = coder.tokenizer.decode(list(prompt.context))
        question = coder.tokenizer.decode(list(prompt.question))
        assert f"{question} {prompt.answer}." in text
        said = coder.encode([f" {prompt.answer}, and so on"])[0][0].tolist()
        assert language.right(said[: language.answer_tokens], prompt.answer)
        assert not language.right(said[2:], prompt.answer)
    facts = [p for p in asked if p.place == Place("associative_recall", 400, 1.0)]
    assert {coder.tokenizer.decode(list(p.context)).count(" The code of") for p in facts} == {4}


def test_text_is_asked_about_where_the_data_are_text(data, base, tmp_path):
    spec = {**SPEC, "metrics": ["recall"], "recall": {**ASKED, "lengths": [300], "samples": 1}}
    part = run_cell("evaluate", spec, {"data": data, "of": base}, tmp_path)["recall"]
    assert part["prompts"]["count"] == 0
    assert {cell["length"] for cell in part["cells"]} == {300}


@pytest.mark.parametrize(("changes", "message"), [
    ({"recall": {**ASKED, "lengths": [8]}}, "8 tokens do not hold 4 fact"),
    ({"recall": {**ASKED, "pairs": 5}}, "a prompt holds at most 4 facts, found 5"),
    ({"divergence": {"prompt": 63, "generate": 1}, "tokens": 60}, "after a prompt of 63 tokens"),
])  # fmt: skip
def test_what_cannot_be_asked_is_one_line(evaluate, changes, message):
    with pytest.raises(JobError, match=message):
        evaluate(**changes)


def test_answers_that_are_not_finite_are_one_line(evaluate, recaller, tmp_path):
    model = recaller(VOCABULARY)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(JobError, match="divergence from the full cache is not finite"):
        evaluate(metrics=["divergence"], of=saved(model, tmp_path / "broken"))


def test_it_stops_when_asked(symbols, model, tmp_path):
    for metric in ("divergence", "recall"):
        spec = {**SPEC, "metrics": [metric]}
        inputs = {"data": symbols, "of": model}
        with pytest.raises(Stopped):
            run_cell("evaluate", spec, inputs, tmp_path / metric, stop_after=1)


def test_only_what_the_past_tells_counts(symbols):
    held = corpus.load(symbols, "train")
    start = told = 0
    for end in held.ends.tolist():
        assert end - start == LENGTH - 1
        ids, counts = held.tokens[start:end].tolist(), held.counts[start:end].tolist()
        follows = {}
        for place, (token, counted) in enumerate(zip(ids, counts, strict=True)):
            before = ids[place - 1] if place else None
            if counted:
                told += 1
                assert token in follows[before]
            follows.setdefault(before, set()).add(token)
        start = end
    # Most words of answers count, and nothing else does.
    assert told == int(held.counts.sum()) > 0.3 * held.tokens.numel()


def test_a_corpus_is_decided_by_its_seed(symbols, tmp_path):
    again = run_cell("data", DATA, {}, tmp_path / "again")
    other = {**DATA, "source": {**DATA["source"], "seed": 1}}
    assert corpus.load(tmp_path / "again", "train").tokens.equal(
        corpus.load(symbols, "train").tokens
    )
    assert again["vocab_size"] == VOCABULARY
    assert again["train_bytes"] > again["train_tokens"]
    run_cell("data", other, {}, tmp_path / "other")
    assert not corpus.load(tmp_path / "other", "train").tokens.equal(
        corpus.load(symbols, "train").tokens
    )


def test_texts_of_one_draw_differ_by_depth_alone(symbols):
    language = language_of(symbols, 2)
    asked = prompts({**ASKED, "tasks": ["associative_recall"]}, language)
    by_depth = {p.place.depth: p for p in asked if p.place.length == 63}
    assert by_depth[0.0].context == by_depth[1.0].context
    assert by_depth[0.0].question != by_depth[1.0].question
    assert language.filler(random.Random(0)) == language.filler(random.Random(0))


@pytest.mark.parametrize("apply", [{"h2o": {}}, {"snapkv": {"window": 2}}], ids=str)
def test_vllm_answers_as_the_torch_engine_does(evaluate, apply):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    cut_ = {**apply, "uniform": {"tokens": 12}}
    own, served = (
        evaluate(cut_, metrics=["recall"], engine=engine)["recall"] for engine in ("torch", "vllm")
    )
    assert own == served
    assert own["accuracy"] > 0
