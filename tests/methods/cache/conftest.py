"""What tests of caches share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvlab.methods.eviction.adore.controller import Controller
from kvlab.methods.eviction.adore.sizes import ControllerConfig


@pytest.fixture(scope="session")
def controllers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ADORE's, for 53 tokens of width 32: one for a whole model, one for each of three layers."""
    made = tmp_path_factory.mktemp("controllers")
    for per, layers in (("model", 1), ("layer", 3)):
        torch.manual_seed(1)
        controller = Controller(ControllerConfig(53, 32, hidden=16, match=8, layers=layers))
        for parameter in controller.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        (made / per).mkdir()
        controller.save(made / per)
    return made
