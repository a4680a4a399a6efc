"""A checkpoint's config.json, of which every key must be understood."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from kvlab import KvlabError
from kvlab.methods.decoder.config import RopeScaling

HARMLESS = frozenset(
    {
        "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache",
        "unk_token_id", "sep_token_id",
        "decoder_start_token_id", "classifier_dropout", "is_decoder", "is_encoder_decoder",
        "pretraining_tp", "torchscript", "task", "return_dict", "output_attentions",
        "output_hidden_states", "id2label", "label2id", "problem_type", "_name_or_path",
        "_attn_implementation_autoset", "_commit_hash", "tokenizer_class",
        "chunk_size_feed_forward",
    }
)  # fmt: skip
"""Keys that do not change what the model computes."""

T = TypeVar("T")
_MISSING = object()


class CheckpointError(KvlabError):
    """A Hugging Face folder that cannot be read, or a model that has no place in one."""


class Settings:
    """The keys of config.json; what nobody takes is refused by `close`, by name.

    Args:
        raw: the parsed file. where: what to call it in errors.
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._left = dict(raw)
        self.where = where

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read config.json; raise a CheckpointError naming it if it is none."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: no readable JSON ({error})") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path}: must be a JSON object, found {type(raw).__name__}")
        return cls(raw, str(path))

    def assume(self, **defaults: Any) -> None:
        """Fill in what transformers' own config class says where a key is absent (null is not)."""
        self._left = {**defaults, **self._left}

    def take(self, key: str, kind: type[T], default: Any = _MISSING) -> T:
        """Remove and return a value; null counts as missing."""
        found = self._left.pop(key, None)
        if found is None:
            if default is _MISSING:
                raise CheckpointError(f"{self.where}: '{key}' is missing")
            return default  # type: ignore[no-any-return]
        if kind is float and isinstance(found, int) and not isinstance(found, bool):
            found = float(found)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise CheckpointError(f"{self.where}: '{key}' must be {kind.__name__}, found {found!r}")
        return found

    def maybe(self, key: str, kind: type[T]) -> T | None:
        """Remove and return a value, or None where it is missing or null."""
        return None if self._left.get(key) is None else self.take(key, kind)

    def size(self, key: str, default: int | None = None) -> int:
        """Remove and return an integer of at least 1."""
        found = self.take(key, int) if default is None else self.take(key, int, default)
        if found < 1:
            raise CheckpointError(f"{self.where}: '{key}' must be at least 1, found {found}")
        return found

    def token(self, key: str, vocabulary: int, default: int) -> int:
        """Remove and return a token's id; the default where there is none (null, or -1).

        Of several (a list of ends) it is the first.
        """
        found = self._left.pop(key, None)
        found = found[0] if isinstance(found, list) and found else found
        usable = isinstance(found, int) and not isinstance(found, bool) and 0 <= found < vocabulary
        return found if usable else default

    def choose(self, key: str, choices: Mapping[str, T]) -> T:
        """Remove a name and return what it stands for; a name that is not listed is refused."""
        name = self.take(key, str)
        if name not in choices:
            known = ", ".join(choices)
            raise CheckpointError(f"{self.where}: '{key}' {name!r} is not supported ({known} are)")
        return choices[name]

    def expect(self, key: str, value: object) -> None:
        """Remove a key that is supported with one value alone (or absent)."""
        found = self._left.pop(key, None)
        if found is not None and found != value:
            raise CheckpointError(
                f"{self.where}: '{key}' {found!r} is not supported: it must be {value!r}"
            )

    def rope(
        self, theta_key: str, fraction_key: str, fraction: float
    ) -> tuple[float, RopeScaling | None, float]:
        """Take the rotary settings, new style or old; return theta, scaling and rotated share.

        `fraction` is the share of a head that the architecture rotates where no key says.
        """
        new, old = self.take("rope_parameters", dict, {}), self.take("rope_scaling", dict, {})
        inner = Settings(old or new, f"{self.where}: rope_parameters")
        theta = inner.take("rope_theta", float, self.take(theta_key, float, 10000.0))
        fraction = self.take(fraction_key, float, fraction)
        fraction = inner.take("partial_rotary_factor", float, fraction)
        kind = inner.take("rope_type", str, inner.take("type", str, "default"))
        inner.expect("type", kind)
        scaling = None
        if kind == "linear":
            scaling = RopeScaling("linear", inner.take("factor", float))
        elif kind == "llama3":
            scaling = RopeScaling(
                "llama3",
                inner.take("factor", float),
                inner.take("low_freq_factor", float),
                inner.take("high_freq_factor", float),
                inner.take("original_max_position_embeddings", int),
            )
        elif kind != "default":
            raise CheckpointError(
                f"{inner.where}: rope_type '{kind}' is not supported (default, linear, llama3 are)"
            )
        inner.close()
        return theta, scaling, fraction

    def close(self) -> None:
        """Refuse every key that was not taken, is not harmless and says something."""
        unknown = sorted(
            key
            for key, value in self._left.items()
            if key not in HARMLESS and value is not None and value not in ([], {})
        )
        if unknown:
            raise CheckpointError(
                f"{self.where}: not supported: {', '.join(map(repr, unknown))}. Remove a key only "
                "if you know that it does not change what the model computes"
            )
