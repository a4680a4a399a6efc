"""Rows of whole blocks: padding, boundaries, the cursor."""

import json

import pytest
import torch

from kvlab.methods.block_transformer.packing import BlockPacker, frame
from kvlab.methods.packing import Documents, PackingError
from kvlab.methods.registry import resolve

EOS = 5


def documents(lengths: list[int], first: int = 10) -> Documents:
    tokens = torch.cat([torch.full((n,), first + d) for d, n in enumerate(lengths)])
    return Documents(tokens, torch.tensor(lengths).cumsum(0), torch.arange(tokens.numel()) % 4 > 0)


@pytest.mark.parametrize(
    ("left", "length", "framed"),
    [
        (0, 4, [7, 8, EOS, 0]),
        (1, 4, [0, 7, 8, EOS]),
        (3, 4, [0, 0, 0, 7, 8, EOS, 0, 0]),
        (2, None, [0, 0, 7, 8, EOS]),
        (0, 1, [7, 8, EOS]),
    ],
)
def test_a_document_is_framed(left: int, length: int | None, framed: list[int]) -> None:
    counts = torch.tensor([False, True])
    rows = frame(torch.tensor([7, 8]), counts, left=left, block_length=length, eos=EOS)
    assert rows.ids.tolist() == framed
    assert rows.valid.tolist() == [token != 0 for token in framed]
    assert rows.counts.tolist() == [token in (8, EOS) for token in framed]


@pytest.mark.parametrize("length", [1, 2, 4])
def test_every_document_begins_in_a_fresh_block(length: int) -> None:
    stream = BlockPacker(documents([5, 1, 9, 3]), 8, eos=EOS, block_length=length)
    rows = stream.take(40)
    blocks = rows.ids.flatten().view(-1, length)
    real = rows.valid.flatten().view(-1, length)
    for block, mask in zip(blocks, real, strict=True):
        assert len({int(t) for t, m in zip(block, mask, strict=True) if m and t != EOS}) <= 1
    assert not rows.ids[~rows.valid].any()
    assert not rows.counts[~rows.valid].any()


def test_left_pads_are_uniform_and_new_every_epoch() -> None:
    """Four tokens, EOS and up to three pads in front always fill the eight tokens of a row."""
    stream = BlockPacker(documents([4] * 400), 8, eos=EOS, seed=2, block_length=4)
    epochs = [stream.take(400).valid.long().argmax(1).tolist() for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert all(60 < epochs[0].count(pads) < 140 for pads in range(4))


def test_padding_can_be_switched_off() -> None:
    source = documents([5, 1, 9])
    plain = BlockPacker(
        source, 9, eos=EOS, block_length=3, random_padding=False, pad_to_block_boundary=False
    )
    assert plain.take(2).valid.all()
    aligned = BlockPacker(source, 9, eos=EOS, block_length=3, random_padding=False)
    assert aligned.take(2).valid[:, 0].all()


@pytest.mark.parametrize("taken", [1, 2, 5, 23])
def test_a_stream_goes_on_exactly_from_its_cursor(taken: int) -> None:
    source = documents([3, 1, 8, 2])
    stream = BlockPacker(source, 8, eos=EOS, seed=1, block_length=4)
    stream.take(taken)
    again = BlockPacker(source, 8, eos=EOS, seed=1, block_length=4)
    again.seek(json.loads(json.dumps(stream.cursor())))
    for a, b in zip(stream.take(9), again.take(9), strict=True):
        assert torch.equal(a, b)


def test_the_method_brings_its_packer() -> None:
    method = resolve({"block_transformer": {"block_length": 4, "random_padding": False}})
    packer = method["granularity"].value.load().packer(method, documents([3]), 8, eos=EOS, seed=7)
    assert isinstance(packer, BlockPacker)
    assert packer.take(1).ids.tolist() == [[10, 10, 10, EOS] * 2]


def test_a_row_must_be_whole_blocks() -> None:
    with pytest.raises(PackingError, match="choose 8 or another block length"):
        BlockPacker(documents([3]), 10, eos=EOS, block_length=4)
