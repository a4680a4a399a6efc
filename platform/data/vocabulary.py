"""What a tokenizer's files say without loading it. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvlab.platform.data.documents import DataError

END_OF_TEXT = "<|endoftext|>"
"""The end of a document in vocabularies that kvlab makes; its id is 0."""
# Names under which families keep it, tried where no tokenizer_config.json says.
KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")


def file_of(path: Path) -> Path:
    """Return the tokenizer.json that `path` is, or holds.

    Raises:
        DataError: there is none.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"tokenizer {path}: no tokenizer.json there; save it with "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)` (a fast tokenizer)"
        )
    return file


def tokens_of(path: Path) -> dict[str, int]:
    """Return every token of a tokenizer.json with its id, added tokens included."""
    file = file_of(path)
    try:
        raw = json.loads(file.read_bytes())
        vocabulary = raw["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram models list [token, score]
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{t["content"]: t["id"] for t in raw.get("added_tokens", ())}}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"tokenizer {file}: not a tokenizer.json ({error!r:.80})") from None


def size(tokenizer: Mapping[str, Any]) -> int:
    """Return how many ids a model needs for a data job's tokenizer.

    Args:
        tokenizer: {"bpe": size}, {"bytes": true}, {"recall": words of each kind} or
            {"path": file or folder}.
    """
    if "recall" in tokenizer:
        from kvlab.platform.data.recall import Symbols

        return len(Symbols(**tokenizer["recall"]).words())
    if "bpe" in tokenizer:
        return int(tokenizer["bpe"])
    if tokenizer.get("bytes"):
        return 257
    return max(tokens_of(Path(tokenizer["path"])).values()) + 1


def end_of_text(path: Path) -> int:
    """Return the id that ends a document, from the files beside tokenizer.json or by known names.

    Raises:
        DataError: neither names a token of the vocabulary.
    """
    tokens = tokens_of(path)
    beside = file_of(path).with_name("tokenizer_config.json")
    named: Any = None
    if beside.is_file():
        named = json.loads(beside.read_bytes()).get("eos_token")
        named = named["content"] if isinstance(named, dict) else named
    for name in [named] if named else KNOWN_ENDS:
        if name in tokens:
            return tokens[name]
    raise DataError(
        f"tokenizer {path}: no end-of-text token ({named or 'tried ' + ', '.join(KNOWN_ENDS)}); "
        'put a tokenizer_config.json with "eos_token" beside tokenizer.json'
    )
