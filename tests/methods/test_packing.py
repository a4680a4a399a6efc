"""The stream of training rows: order, framing, cutting and the cursor."""

import json

import pytest
import torch

from kvlab.methods.packing import Documents, PackingError, TokenPacker

EOS = 9


def documents(lengths: list[int]) -> Documents:
    """Document d holds the ids 10 d, 10 d + 1, ...; every third token is context only."""
    parts = [10 * d + torch.arange(n) % 9 for d, n in enumerate(lengths, start=1)]
    tokens = torch.cat(parts).to(torch.int32)
    return Documents(tokens, torch.tensor(lengths).cumsum(0), torch.arange(tokens.numel()) % 3 != 0)


def test_an_epoch_holds_every_token_once_and_one_eos_a_document() -> None:
    source = documents([3, 0, 5, 1])
    rows = TokenPacker(source, 13, eos=EOS, seed=4).take(1)
    assert sorted(rows.ids[0].tolist()) == sorted([*source.tokens.tolist(), *[EOS] * 4])
    assert rows.valid.all()
    assert int(rows.counts.sum()) == int(source.counts.sum()) + 4


def test_the_order_changes_with_seed_and_epoch() -> None:
    source = documents([1] * 20)
    epochs = {
        tuple(TokenPacker(source, 40, eos=EOS, seed=s).take(2)[0][e].tolist())
        for s in (0, 1)
        for e in (0, 1)
    }
    assert len(epochs) == 4


@pytest.mark.parametrize("taken", [0, 1, 2, 7, 31])
def test_a_stream_goes_on_exactly_from_its_cursor(taken: int) -> None:
    source = documents([3, 1, 8, 2])
    stream = TokenPacker(source, 5, eos=EOS, seed=1)
    stream.take(taken) if taken else None
    cursor = json.loads(json.dumps(stream.cursor()))
    again = TokenPacker(source, 5, eos=EOS, seed=1)
    again.seek(cursor)
    for a, b in zip(stream.take(9), again.take(9), strict=True):
        assert torch.equal(a, b)


def test_the_stream_does_not_depend_on_how_many_rows_are_taken_at_once() -> None:
    source = documents([3, 1, 8, 2])
    one, many = (TokenPacker(source, 4, eos=EOS) for _ in range(2))
    singly = torch.cat([one.take(1).ids for _ in range(12)])
    assert torch.equal(singly, many.take(12).ids)


def test_a_cursor_of_other_data_is_refused() -> None:
    cursor = TokenPacker(documents([1] * 9), 4, eos=EOS, seed=1).cursor() | {"place": 8}
    with pytest.raises(PackingError, match="other data"):
        TokenPacker(documents([1, 1]), 4, eos=EOS, seed=1).seek(cursor)
    with pytest.raises(PackingError, match="other data"):
        TokenPacker(documents([1] * 9), 4, eos=EOS, seed=2).seek(cursor)


def test_data_without_documents_or_cut_short_is_refused() -> None:
    with pytest.raises(PackingError, match="incomplete"):
        Documents(torch.zeros(3), torch.tensor([]))
    with pytest.raises(PackingError, match="incomplete"):
        Documents(torch.zeros(3), torch.tensor([2]))
