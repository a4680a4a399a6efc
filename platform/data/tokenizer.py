"""Tokenizers that also say how many UTF-8 bytes each token stands for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvlab.platform.data import vocabulary
from kvlab.platform.data.documents import DataError
from kvlab.platform.data.recall import Symbols
from kvlab.platform.data.vocabulary import END_OF_TEXT

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Ints = NDArray[np.int32]


class Coder:
    """Text to token ids and the bytes behind each.

    Attributes:
        tokenizer: the `tokenizers` object, whose JSON is published with the data.
        begin: the id that begins a document, where the tokenizer itself puts one in front of text.
        end: the id that ends a document. size: ids a model needs.

    Args:
        widths: bytes per id [size], where they are known; they are checked against every text.
    """

    def __init__(self, tokenizer: Tokenizer, end: int, widths: Ints | None = None) -> None:
        self.tokenizer, self.end = tokenizer, end
        self.begin = _begin(tokenizer)
        self.size = max(tokenizer.get_vocab().values()) + 1
        self._widths = _widths(tokenizer, self.size) if widths is None else widths

    @property
    def opening(self) -> tuple[Ints, Ints]:
        """What stands in front of every document: ids [0 or 1], which stand for no bytes."""
        ids = np.asarray([] if self.begin is None else [self.begin], dtype=np.int32)
        return ids, np.zeros_like(ids)

    def encode(self, texts: Sequence[str]) -> list[tuple[Ints, Ints]]:
        """Return for each text its ids [n] and the UTF-8 bytes [n] each token stands for.

        The bytes of a text's tokens add up to the text's own, exactly.
        """
        if self._widths is None:
            found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return [_by_offsets(e, text) for e, text in zip(found, texts, strict=True)]
        fast = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        coded = []
        for encoding, text in zip(fast, texts, strict=True):
            ids = np.asarray(encoding.ids, dtype=np.int32)
            widths = self._widths[ids]
            if int(widths.sum()) != len(text.encode()):  # a normalizer changed the text
                whole = self.tokenizer.encode(text, add_special_tokens=False)
                coded.append(_by_offsets(whole, text))
            else:
                coded.append((ids, widths))
        return coded


def make(settings: Mapping[str, Any], sample: Iterable[str]) -> Coder:
    """Return the tokenizer of a data job: trained on `sample`, read from a path, or plain bytes.

    Args:
        settings: {"bpe": size}, {"path": tokenizer.json or a folder with one}, {"bytes": true}, or
            {"recall": words of each kind} for the vocabulary of `kvlab.platform.data.recall`.

    Raises:
        DataError: the path holds no usable tokenizer.
    """
    if "path" in settings:
        from tokenizers import Tokenizer

        path = Path(settings["path"])
        end = vocabulary.end_of_text(path)
        try:
            return Coder(Tokenizer.from_file(str(vocabulary.file_of(path))), end)
        except Exception as error:  # the Rust side raises bare Exception
            raise DataError(f"tokenizer {path}: {error}") from None
    if "recall" in settings:
        words = Symbols(**settings["recall"]).words()
        # A space ends every word; the first is no text.
        widths = [0, *(len(word) + 1 for word in words[1:])]
        return Coder(_by_word(words), end=0, widths=np.asarray(widths, dtype=np.int32))
    return Coder(_byte_level(None if settings.get("bytes") else settings["bpe"], sample), end=0)


def _byte_level(size: int | None, sample: Iterable[str]) -> Tokenizer:
    """Byte-level BPE of `size` ids, or of single bytes alone; id 0 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = {END_OF_TEXT: 0, **{token: i for i, token in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=plain, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if size is None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    else:
        if size < len(plain):
            raise DataError(f"tokenizer: bpe must be at least {len(plain)}, found {size}")
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(sample, trainer)
    # Text that spells the end token is text: it must not end a document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _by_word(words: Sequence[str]) -> Tokenizer:
    """One token per word, told apart by spaces; the first ends a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([words[0]])
    return tokenizer


def _begin(tokenizer: Tokenizer) -> int | None:
    """The id that the tokenizer's own template puts in front of a text."""
    text = "a"
    bare = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.encode(text).ids
    return whole[0] if whole[: len(bare)] != bare and whole[1 : len(bare) + 1] == bare else None


def _widths(tokenizer: Tokenizer, size: int) -> Ints | None:
    """Bytes per id [size] of a byte-level vocabulary (one character a byte), else None."""
    from tokenizers import pre_tokenizers

    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        return None
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    widths = np.zeros(size, dtype=np.int32)
    for token, index in tokenizer.get_vocab().items():
        widths[index] = len(token) if alphabet.issuperset(token) else len(token.encode())
    return widths


def _by_offsets(encoding: Encoding, text: str) -> tuple[Ints, Ints]:
    """Bytes from character offsets: each token takes what no token before it took."""
    ids = np.asarray(encoding.ids, dtype=np.int32)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width = 1 + (points >= 0x80).astype(np.int32) + (points >= 0x800) + (points >= 0x10000)
    before = np.concatenate([[0], np.cumsum(width)])
    reached = np.maximum.accumulate([end for _, end in encoding.offsets] or [0])
    if len(ids):
        reached[-1] = len(points)
    taken = np.diff(before[reached], prepend=0)[: len(ids)]
    return ids, taken.astype(np.int32)
