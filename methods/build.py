"""From a config and a method to a model. The granularity axis decides the class."""

from __future__ import annotations

from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.model import LanguageModel


def build(config: DecoderConfig, method: Method) -> LanguageModel:
    """Return a freshly initialised model with the method's train-time axes applied.

    Torch's global random state decides the weights; seed it before.
    """
    model: LanguageModel = method["granularity"].value.load()(config, method)
    return model


def convert(parent: LanguageModel, method: Method) -> LanguageModel:
    """Return a new model under `method` that starts from a trained parent's weights (uptraining).

    Raises:
        KvlabError: the parent cannot be turned into that.
    """
    model: LanguageModel = method["granularity"].value.load().convert(parent, method)
    return model
