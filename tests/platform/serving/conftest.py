"""Models for servers, small enough that an engine over them starts in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.registry import resolve

VOCABULARY = 257
SIZES = {**llama(128, 4, 4, 2, 256), "max_positions": 512, "init_std": 0.08}


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of models as kvlab's jobs publish them, by their train-time method."""
    made: dict[str, Path] = {}

    def find(method: dict[str, Any] | None = None, **sizes: Any) -> Path:
        key = repr((method, sizes))
        if key not in made:
            torch.manual_seed(0)
            config = DecoderConfig(VOCABULARY, **{**SIZES, **sizes})
            made[key] = tmp_path_factory.mktemp("served")
            build(config, resolve(method or {})).save(made[key])
        return made[key]

    return find
