"""What is tried: a checkpoint folder, or what a job of kvlab published, read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlab import KvlabError
from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import from_dict
from kvlab.platform.data import vocabulary
from kvlab.platform.jobs.checkpoint import check_weights, read_config, trained_method
from kvlab.platform.jobs.flops import cost_under


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to try.

    Attributes:
        folder: absolute. name: of its folder or job. config: its sizes.
        trained: its train-time axes, canonical.
        tokenizer: whether its own tokenizer lies beside it, and can be used.
        why: why it cannot; empty where it can.
    """

    folder: Path
    name: str
    config: DecoderConfig
    trained: Mapping[str, Any]
    tokenizer: bool
    why: str

    @property
    def method(self) -> Method:
        return from_dict(self.trained)

    @property
    def span(self) -> int:
        """Tokens that one position of its cache stands for."""
        return self.method.span()

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of its weights at so many bytes a number."""
        return cost_under(self.config, self.trained).total_parameters() * itemsize


def read(folder: Path, name: str) -> Subject:
    """Look at a checkpoint folder; no weight is loaded.

    Raises:
        KvlabError: no checkpoint, one of unknown maths, or one whose weights are not whole.
    """
    folder = folder.absolute()
    config = read_config(folder)
    check_weights(folder)
    trained = trained_method(folder)
    why = _no_tokenizer(folder, config)
    return Subject(folder, name, config, trained, not why, why)


def _no_tokenizer(folder: Path, config: DecoderConfig) -> str:
    try:
        vocabulary.end_of_text(folder)
        size = vocabulary.size({"path": str(folder)})
    except KvlabError as error:
        return str(error)
    if size > config.vocab_size:
        return f"its tokenizer has {size} tokens, its vocabulary {config.vocab_size}"
    return ""
