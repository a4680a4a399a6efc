"""The reference implementation's own numbers (tests/golden/block_transformer/README.json)."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvlab.methods.block_transformer.convert import convert
from kvlab.methods.block_transformer.model import BlockTransformer
from kvlab.methods.block_transformer.packing import frame
from kvlab.methods.block_transformer.reference import from_reference, take_neox
from kvlab.methods.decoder.config import DecoderConfig, gpt_neox
from kvlab.methods.decoder.generation import generate
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.packing import Rows
from kvlab.methods.registry import resolve

FOLDERS = [Path(__file__).parents[2] / "golden/block_transformer"]
if "KVLAB_GOLDEN" in os.environ:
    FOLDERS.append(Path(os.environ["KVLAB_GOLDEN"]) / "block_transformer")
CASES = [case for folder in FOLDERS for case in sorted(folder.glob("case_*.safetensors"))]
CLOSE = {"atol": 5e-5, "rtol": 5e-5}


class Case:
    """One golden file: its tensors, its config and the model that its weights make."""

    def __init__(self, path: Path) -> None:
        self.tensors = load_file(path)
        about = json.loads((path.parent / "README.json").read_text())["cases"][path.name]
        self.config, self.info = about["config"], about.get("info", {})
        self.model = from_reference(
            self.below("w."),
            heads=self.config["Hb"],
            token_heads=self.config["Ht"],
            rotary_fraction=self.config["rot"],
            rope_theta=self.config["base"],
            token_decoder=self.config["strategy"],
        ).eval()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def cases(*patterns: str) -> pytest.MarkDecorator:
    """Parametrise over the files that hold tensors of all these names."""
    paths = []
    for path in CASES:
        names = list(load_file(path))
        if all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns):
            paths.append(path)
    assert paths
    ids = [f"{path.parents[1].name}-{path.stem}" for path in paths]
    return pytest.mark.parametrize("case", paths, ids=ids, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@cases("clean.block_embeds", "clean.context", "clean.expanded")
def test_stages(case: Case) -> None:
    model = case.model
    blocks, _ = model.blocks(case["clean.input_ids"], None)
    with torch.no_grad():
        embeds, context = model.embedder(blocks), model.contexts(blocks, None)
        expanded = model.token_decoder.expansion(context)
    assert torch.equal(embeds, case["clean.block_embeds"])
    torch.testing.assert_close(context, case["clean.context"], **CLOSE)
    torch.testing.assert_close(expanded, case["clean.expanded"], **CLOSE)


@cases("clean.logits", "clean.loss")
def test_logits_and_loss(case: Case) -> None:
    ids = case["clean.input_ids"]
    with torch.no_grad():
        logits, score = case.model.logits(ids), case.model(ids)
    torch.testing.assert_close(logits, case["clean.logits"], **CLOSE)
    assert score.nll[score.scored].mean().item() == pytest.approx(case["clean.loss"].item(), 1e-6)


@cases("clean.loss_by_position")
def test_loss_by_place_in_the_block(case: Case) -> None:
    with torch.no_grad():
        score = case.model(case["clean.input_ids"])
    length = case.config["LB"]
    by_place = score.nll[:, length:].unflatten(1, (-1, length)).mean((0, 1))
    torch.testing.assert_close(by_place, case["clean.loss_by_position"], atol=1e-5, rtol=0)


@cases("padded.logits", "padded.loss")
def test_padding(case: Case) -> None:
    valid = case["padded.attention_mask"].bool()
    flat = case["padded.input_ids"].flatten(1), valid.flatten(1)
    with torch.no_grad():
        logits, score = case.model.logits(*flat), case.model(*flat)
    real = valid[:, 1:]
    torch.testing.assert_close(logits[real], case["padded.logits"][real], **CLOSE)
    assert torch.equal(score.scored.view_as(valid)[:, 1:], real)
    assert score.nll[score.scored].mean().item() == pytest.approx(case["padded.loss"].item(), 1e-6)


@cases("pack.tokens")
def test_packer(case: Case) -> None:
    """The packer's rows are the first rows of the padded batch; the last row there is hand-made.

    The reference masks the EOS of a document that ends on a block boundary, and only that one; ours
    counts every EOS.
    """
    documents = case["pack.tokens"].split(case["pack.doc_lengths"].tolist())
    lefts, rights = (case[f"pack.{side}_pad_lengths"].tolist() for side in ("left", "right"))
    stretches, unmasked, start = [], [], 0
    for document, left, right in zip(documents, lefts, rights, strict=True):
        counts = torch.ones_like(document, dtype=torch.bool)
        stretch = frame(document, counts, left=left, block_length=case.config["LB"], eos=0)
        assert stretch.ids.numel() == left + document.numel() + 1 + right
        stretches.append(stretch)
        start += stretch.ids.numel()
        unmasked += [start - 1] if right == 0 else []
    golden = case["padded.input_ids"][:-1].flatten()
    rows = Rows(*(torch.cat(column)[: golden.numel()] for column in zip(*stretches, strict=True)))
    mask = case["padded.attention_mask"][:-1].flatten().bool()
    assert torch.equal(rows.ids, golden)
    assert torch.equal(rows.counts, rows.valid)
    differing = (rows.valid != mask).nonzero().flatten().tolist()
    assert differing == [place for place in unmasked if place < golden.numel()]


@cases(r"gen\.p\d+\.greedy")
def test_greedy_ids(case: Case) -> None:
    """Aligned and unaligned prompts, with the positions that training uses."""
    found = [re.fullmatch(r"gen\.p(\d+)\.greedy", name) for name in case.tensors]
    lengths = [int(match[1]) for match in found if match]
    for prompt in lengths:
        golden = case[f"gen.p{prompt}.greedy"]
        prompts = golden[:, :prompt].tolist()
        assert (
            generate(case.model, prompts, golden.shape[1] - prompt) == golden[:, prompt:].tolist()
        )


@cases(r"gen_eos\.p\d+\.output")
def test_greedy_ids_up_to_the_end_of_text(case: Case) -> None:
    about = case.info["gen_eos"]
    eos, prompt = about["eos_token_id"], about["prompt_len"]
    golden = [row[: row.index(eos) + 1] for row in about["new_tokens"]]
    prompts = case["clean.input_ids"][:, :prompt].tolist()
    assert generate(case.model, prompts, len(about["new_tokens"][0]), eos=eos) == golden


def vanilla(case: Case) -> TokenModel:
    """The decoder that the uptraining case was converted from."""
    width, heads = case.config["Db"], case.config["Hb"]
    state = case.below("vanilla.")
    config = DecoderConfig(
        vocab_size=case.config["V"],
        **gpt_neox(width, case.config["Lb"] + case.config["Lt"], heads),
    )
    model = TokenModel(config, resolve({}))
    tensors = {f"decoder.{n}": t for n, t in take_neox(state, "gpt_neox.", heads)}
    tensors["decoder.embedding.weight"] = state["gpt_neox.embed_in.weight"]
    tensors["decoder.output.weight"] = state["embed_out.weight"]
    model.load_state_dict(tensors)
    return model.eval()


@cases("vanilla_logits")
def test_the_vanilla_decoder(case: Case) -> None:
    decoder = vanilla(case).decoder
    with torch.no_grad():
        logits = decoder.head(decoder.body(decoder.embed(case["clean.input_ids"])))
    torch.testing.assert_close(logits, case["vanilla_logits"], **CLOSE)


@cases("vanilla_logits")
def test_uptraining_starts_from_the_reference_conversion(case: Case) -> None:
    sizes = {"block_length": case.config["LB"], "prefix_length": case.config["prefix"]}
    method = resolve({"block_transformer": sizes})
    model = convert(vanilla(case), method)
    expected = case.model.state_dict()
    found = model.state_dict()
    assert set(found) == set(expected)
    assert not [name for name in found if not torch.equal(found[name], expected[name])]
    with torch.no_grad():
        logits = model(case["clean.input_ids"])
        torch.testing.assert_close(
            logits.nll[logits.scored].mean(), case["clean.loss"], atol=1e-5, rtol=0
        )


@cases("clean.logits")
def test_an_imported_model_is_stored_and_loaded(case: Case, tmp_path: Path) -> None:
    from kvlab.methods.store import load

    case.model.save(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, BlockTransformer)
    assert torch.equal(
        again.logits(case["clean.input_ids"]), case.model.logits(case["clean.input_ids"])
    )
