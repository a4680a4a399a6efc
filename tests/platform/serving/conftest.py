"""Models for servers, small enough that an engine over them starts in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.eviction.adore.controller import Controller
from kvlab.methods.eviction.adore.sizes import ControllerConfig
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


@pytest.fixture(scope="session")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ADORE's, for these models; its scores differ widely from token to token."""
    torch.manual_seed(1)
    made = Controller(ControllerConfig(VOCABULARY, 128, hidden=16, match=8))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("controller")
    made.save(folder)
    return folder
