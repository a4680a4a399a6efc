"""What every job of a workflow shares: its text, its tokenizer, its model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvlab import KvlabError
from kvlab.platform.data import vocabulary
from kvlab.platform.data.files import matching
from kvlab.platform.jobs.data.settings import DataSettings, resolve_source
from kvlab.platform.jobs.model import resolve_model
from kvlab.platform.spec.contents import Contents
from kvlab.platform.spec.workflow import Workflow

_FIELD = re.compile(r"(\w+): ")


def shared_data(workflow: Workflow, folder: Path, contents: Contents) -> dict[str, Any]:
    """Return `Surroundings.data`; mistakes go to the workflow.

    Without `data:` it has no source: jobs that need text are told so one by one.
    """
    shared: dict[str, Any] = {"folder": str(folder), "contents": contents, "vocab_size": None}
    settings = workflow.top.get("data")
    if settings is None:
        return shared
    assert isinstance(settings, DataSettings)
    length = settings.sequence_length
    source = resolve_source(settings.source, settings.format, folder, length)
    shared |= {"sequence_length": length, "source": source}
    try:
        _readable(source, settings.format)
        shared["fingerprint"] = contents.source(source, settings.format)
    except KvlabError as error:
        workflow.blame(("data", "source"), str(error))
    except OSError as error:
        workflow.blame(("data", "source"), f"cannot be read: {error}")
    try:
        shared["tokenizer"] = _tokenizer(settings, workflow, folder, contents)
        shared["vocab_size"] = vocabulary.size(shared["tokenizer"])
    except KvlabError as error:
        if settings.tokenizer is not None or not _wrong_checkpoint(workflow, shared):
            workflow.blame(("data", "tokenizer"), str(error))
    except OSError as error:
        workflow.blame(("data", "tokenizer"), f"cannot be read: {error}")
    return shared


def shared_model(workflow: Workflow, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `Surroundings.model`; mistakes go to the workflow. Empty without `model:`."""
    settings = workflow.top.get("model")
    if settings is None:
        return {}
    try:
        return resolve_model(settings, data)
    except KvlabError as error:
        for path, message in _located(str(error), workflow.document.value["model"]):
            workflow.blame(("model", *path), message)
    except OSError as error:
        workflow.blame(("model",), f"cannot be read: {error}")
    return {}


def _wrong_checkpoint(workflow: Workflow, data: Mapping[str, Any]) -> bool:
    """Whether the model is refused for its checkpoint: that it has no tokenizer follows from it."""
    model = workflow.top.get("model")
    if model is None or getattr(model, "checkpoint", None) is None:
        return False
    try:
        resolve_model(model, data)
    except (KvlabError, OSError):
        return True
    return False


def _located(message: str, raw: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """A message that begins with the name of a written key belongs to that key."""
    match = _FIELD.match(message)
    if match and isinstance(raw, Mapping) and match.group(1) in raw:
        yield (match.group(1),), message[match.end() :]
    else:
        yield (), message


def _readable(source: Mapping[str, Any], layout: str) -> None:
    kind = source["kind"]
    if kind in ("python", "recall") and layout == "chat":
        raise KvlabError(f"{kind} holds no conversations: use format: text")
    if kind == "text" and not Path(source["path"]).is_file():
        raise KvlabError(f"there is no file '{source['path']}'")
    if kind == "folder":
        matching(Path(source["path"]), source["pattern"])


def _tokenizer(
    data: DataSettings, workflow: Workflow, folder: Path, contents: Contents
) -> dict[str, Any]:
    settings, recall = data.tokenizer, data.source.recall
    if recall is not None:
        if settings is not None:
            raise KvlabError("recall brings its own vocabulary: leave tokenizer out")
        return {"recall": recall.symbols()}
    if settings is None:
        model = workflow.top.get("model")
        checkpoint = getattr(model, "checkpoint", None)
        if checkpoint is None:
            raise KvlabError(
                "is required: {bpe: SIZE}, {path: FOLDER} or {bytes: true} "
                "(only a model from a checkpoint brings its own)"
            )
        path = (folder / checkpoint).absolute()
    elif settings.path is not None:
        path = (folder / settings.path).absolute()
    else:
        return {"bytes": True} if settings.bytes else {"bpe": settings.bpe}
    vocabulary.tokens_of(path)
    return {"path": str(path), "fingerprint": contents.tokenizer(path)}
