"""What stands under `data:`: where text comes from and how it becomes tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import CoreSchema

from kvlab.platform.data.files import pattern_of
from kvlab.platform.jobs.field import nested, wrong
from kvlab.platform.jobs.kind import Kind, Settings, Surroundings
from kvlab.platform.jobs.quantities import Count

SOURCES = ("python", "recall", "text", "folder", "hub")
TOKENIZERS = ("bpe", "path", "bytes")
_DETAILS = {
    "pattern": ("folder",),
    "config": ("hub",),
    "split": ("hub",),
    "column": ("text", "folder", "hub"),
    "revision": ("hub",),
}


class Recall(Settings):
    """`recall: {}`: seeded documents of keys and values; see docs/data.md."""

    documents: int = Field(default=8000, ge=2, le=10_000_000)
    keys: int = Field(default=32, ge=2, le=65536)
    values: int = Field(default=64, ge=2, le=65536)
    filler: int = Field(default=32, ge=1, le=65536)
    pairs: int = Field(default=16, ge=1, le=65536)
    answer: int = Field(default=2, ge=1, le=64)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _enough(self) -> Recall:
        if self.pairs > self.keys:
            raise nested([(("pairs",), f"must be at most keys ({self.keys}), found {self.pairs}")])
        if self.pairs * self.answer > self.values:
            needed = f"{self.pairs} pairs of {self.answer} words each"
            raise nested([(("values",), f"must be enough for {needed}, found {self.values}")])
        return self

    def symbols(self) -> dict[str, int]:
        """The words of each kind: what its tokenizer knows."""
        return {"keys": self.keys, "values": self.values, "filler": self.filler}


class Source(Settings):
    """`python`, `{recall: {...}}`, `{text: FILE}`, `{folder: DIR}` or `{hub: NAME}`."""

    python: Literal[True] | None = None
    recall: Recall | None = None
    text: str | None = None
    folder: str | None = None
    pattern: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: Any) -> dict[str, Any]:
        written: dict[str, Any] = handler.resolve_ref_schema(handler(core))
        written["properties"].pop("python", None)
        whole = dict(written)
        whole["oneOf"] = [{"required": [kind]} for kind in SOURCES if kind != "python"]
        return {"anyOf": [{"enum": ["python", "recall"]}, whole]}

    @model_validator(mode="before")
    @classmethod
    def _named(cls, written: Any) -> Any:
        if written == "python":
            return {"python": True}
        if written == "recall":
            return {"recall": {}}
        if not isinstance(written, Mapping):
            raise wrong("must be python, recall, {text: FILE}, {folder: DIR} or {hub: NAME}")
        return written

    @model_validator(mode="after")
    def _one(self) -> Source:
        chosen = [kind for kind in SOURCES if getattr(self, kind) is not None]
        if len(chosen) != 1:
            raise wrong(f"must be exactly one of {', '.join(SOURCES)}, found {_listed(chosen)}")
        misplaced = [
            ((name,), f"belongs to {' or '.join(kinds)}, not to {chosen[0]}")
            for name, kinds in _DETAILS.items()
            if getattr(self, name) is not None and chosen[0] not in kinds
        ]
        if misplaced:
            raise nested(misplaced)
        return self


class Tokenizer(Settings):
    """`{bpe: VOCABULARY}` trained on the data, `{path: FOLDER_OR_FILE}`, or `{bytes: true}`."""

    bpe: int | None = Field(default=None, ge=257, le=1_000_000)
    path: str | None = None
    bytes: Literal[True] | None = None

    @model_validator(mode="after")
    def _one(self) -> Tokenizer:
        chosen = [kind for kind in TOKENIZERS if getattr(self, kind) is not None]
        if len(chosen) != 1:
            raise wrong(f"must be exactly one of {', '.join(TOKENIZERS)}, found {_listed(chosen)}")
        return self


class DataSettings(Settings):
    """`data:` of a workflow."""

    source: Source
    tokenizer: Tokenizer | None = None
    sequence_length: int = Field(ge=2, le=2**20)
    format: Literal["text", "chat"] = "text"
    holdout: float = Field(default=0.1, gt=0, le=1)
    max_tokens: Count | None = Field(default=None, ge=1)


def _listed(chosen: list[str]) -> str:
    return " and ".join(chosen) if chosen else "none"


class Data(Kind):
    """Text, split, tokenised and packed once; every job of the workflow reads it."""

    name = "data"
    settings = DataSettings

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        assert isinstance(settings, DataSettings)
        return {
            "source": around.data["source"],
            "format": settings.format,
            "fingerprint": around.data["fingerprint"],
            "tokenizer": around.data["tokenizer"],
            "holdout": settings.holdout,
            "max_tokens": settings.max_tokens,
        }

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return ("kvlab.platform.jobs.data", "kvlab.platform.data")

    def libraries(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        streamed = ("datasets",) if spec["source"]["kind"] == "hub" else ()
        return ("tokenizers", *streamed)


def resolve_source(
    source: Source, layout: str, folder: Path, sequence_length: int
) -> dict[str, Any]:
    """Return the `source` part of a data job's spec; paths start from `folder`."""
    if source.python:
        return {"kind": "python"}
    if source.recall is not None:
        # With its end of text, a document fills a row: no question reaches into another document.
        return {"kind": "recall", "length": sequence_length - 1, **source.recall.model_dump()}
    if source.text is not None:
        found: dict[str, Any] = {"kind": "text", "path": str((folder / source.text).absolute())}
    elif source.folder is not None:
        found = {"kind": "folder", "path": str((folder / source.folder).absolute())}
        found["pattern"] = pattern_of({"pattern": source.pattern}, layout)
    else:
        assert source.hub is not None
        local = folder / source.hub
        name = str(local.absolute()) if local.is_dir() else source.hub
        found = {"kind": "hub", "name": name, "split": source.split or "train"}
        found |= {"config": source.config, "revision": source.revision}
    return {**found, "column": source.column}
