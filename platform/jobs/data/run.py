"""The data job: read documents, make the tokenizer, split, tokenise, publish."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from kvlab.platform.data import holdout, source
from kvlab.platform.data.corpus import Writer
from kvlab.platform.data.documents import DataError, Document
from kvlab.platform.jobs.context import Context, Stopped

SAMPLE = 8_000_000
"""Characters of training documents a BPE is trained on."""
BATCH = 1_000_000
"""Characters that are tokenised at once."""


def run(spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Publish tokenizer.json, data.json, train.safetensors and heldout.safetensors.

    Args:
        spec: source, format, tokenizer, holdout (share of documents), max_tokens (stop after the
            document that reaches it; None: all).

    Raises:
        DataError: the source cannot be read as asked, or is too little to be split.
    """
    # Read once, when `tokenizers` starts its threads.
    os.environ.setdefault("RAYON_NUM_THREADS", str(context.threads))
    from kvlab.platform.data import tokenizer

    share = float(spec["holdout"])
    stream = source.documents(spec["source"], spec["format"])
    head = list(_up_to(SAMPLE, stream)) if "bpe" in spec["tokenizer"] else []
    sample = (segment.text for d in head if not holdout.held_out(d, share) for segment in d)
    coder = tokenizer.make(spec["tokenizer"], sample)

    train, heldout = Writer(), Writer()
    limit = spec["max_tokens"]
    documents = chain(head, stream)
    while batch := list(_up_to(BATCH, documents)):
        if context.stopping():
            raise Stopped
        coded = iter(coder.encode([segment.text for d in batch for segment in d]))
        for document in batch:
            pieces = [(*next(coded), segment.counts) for segment in document]
            if any(len(ids) for ids, _, _ in pieces):
                pieces.insert(0, (*coder.opening, False))
            if limit is None or train.total + heldout.total < limit:
                (heldout if holdout.held_out(document, share) else train).add(pieces)
        done = train.total + heldout.total
        context.progress(done, limit or done, "tokens")
        if limit is not None and done >= limit:
            break

    coder.tokenizer.save(str(context.folder / "tokenizer.json"))
    parts = {
        name: part.write(context.folder / f"{name}.safetensors")
        for name, part in (("train", train), ("heldout", heldout))
    }
    _check(spec, parts)
    result = {
        "vocab_size": coder.size,
        "beginning_of_text": coder.begin,
        "end_of_text": coder.end,
        "documents": parts["train"]["documents"] + parts["heldout"]["documents"],
        **{f"{name}_{key}": n for name, part in parts.items() for key, n in part.items()},
    }
    (context.folder / "data.json").write_text(json.dumps(result, indent=1))
    return result


def _up_to(characters: int, documents: Iterator[Document]) -> Iterator[Document]:
    """Yield documents until they hold that many characters."""
    for document in documents:
        yield document
        characters -= sum(len(segment.text) for segment in document)
        if characters <= 0:
            return


def _check(spec: Mapping[str, Any], parts: Mapping[str, Mapping[str, int]]) -> None:
    where = spec["source"].get("path") or spec["source"].get("name") or spec["source"]["kind"]
    total = parts["train"]["documents"] + parts["heldout"]["documents"]
    if not total:
        raise DataError(f"data {where}: holds no text")
    for name, part in parts.items():
        wanted = spec["holdout"] < 1 if name == "train" else spec["holdout"]
        if not part["documents"] and wanted:
            raise DataError(
                f"data {where}: {total} document(s) are too few to hold out {spec['holdout']:g} "
                f"of them: none is left for the {name} part; give more text or another holdout"
            )
    if parts["train"]["documents"] and not parts["train"]["targets"]:
        raise DataError(f"data {where}: no training token counts: no turn is by the assistant")
