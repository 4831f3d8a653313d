"""Published models by name: the sizes in their config.json, as data."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from optstate.memory.errors import SourceError
from optstate.text import shown

__all__ = ["CONFIGS", "find_config", "unknown_source"]

Config = Mapping[str, Any]


def _llama(hidden: int, inner: int, layers: int, heads: int, keys: int, vocab: int, positions: int) -> dict[str, Any]:
    """Return what the config.json of a model of Llama's kind says about sizes. keys: heads of keys and values."""
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
    }


def _qwen2(hidden: int, inner: int, layers: int, heads: int, keys: int, tied: bool, positions: int) -> dict[str, Any]:
    vocab = 151936 if hidden < 3584 else 152064
    config = _llama(hidden, inner, layers, heads, keys, vocab, positions)
    return config | {"model_type": "qwen2", "tie_word_embeddings": tied}


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    config = _llama(hidden, inner, layers, heads, 8, 151936, 40960)
    return config | {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": tied}


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"n_embd": hidden, "n_layer": layers, "n_head": heads}
    return {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, **sizes}


CONFIGS: Mapping[str, Config] = MappingProxyType(
    {
        "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000, 2048),
        "llama-13b": _llama(5120, 13824, 40, 40, 40, 32000, 2048),
        "llama-30b": _llama(6656, 17920, 60, 52, 52, 32000, 2048),
        "llama-65b": _llama(8192, 22016, 80, 64, 64, 32000, 2048),
        "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, 4096),
        "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, 4096),
        "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, 4096),
        "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192),
        "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256, 8192),
        "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256, 131072),
        "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256, 131072),
        "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, 128256, 131072),
        "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, 131072) | {"tie_word_embeddings": True},
        "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, 131072) | {"tie_word_embeddings": True},
        "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000, 2048),
        "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32000, 32768) | {"model_type": "mistral"},
        "qwen2-0.5b": _qwen2(896, 4864, 24, 14, 2, True, 131072),
        "qwen2-1.5b": _qwen2(1536, 8960, 28, 12, 2, True, 131072),
        "qwen2-7b": _qwen2(3584, 18944, 28, 28, 4, False, 131072),
        "qwen2-72b": _qwen2(8192, 29568, 80, 64, 8, False, 131072),
        "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, True, 32768),
        "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, True, 131072),
        "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, True, 32768),
        "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, False, 131072),
        "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, False, 131072),
        "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, False, 131072),
        "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, False, 131072),
        "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
        "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
        "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
        "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
        "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
        "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
        "gpt2": _gpt2(768, 12, 12),
        "gpt2-medium": _gpt2(1024, 24, 16),
        "gpt2-large": _gpt2(1280, 36, 20),
        "gpt2-xl": _gpt2(1600, 48, 25),
    }
)
"""Configs as published, by names in lower case, without the values that change no size (rotations, epsilons)."""


def find_config(name: str) -> dict[str, Any] | None:
    """Return the config of a published model, upper and lower case alike; None if there is none of this name."""
    config = CONFIGS.get(name.lower())
    return None if config is None else dict(config)


def _near(name: str) -> str:
    """Return a hint: the names most like this one, an owner as on the Hub left out; some names if none is."""
    matches = difflib.get_close_matches(name.lower().rpartition("/")[2], CONFIGS, n=3, cutoff=0.6)
    if matches:
        return "did you mean " + " or ".join(repr(match) for match in matches) + "?"
    return f"names known here: {', '.join(['llama-7b', 'llama-3.1-8b', 'mistral-7b', 'qwen2.5-7b', 'gpt2'])} ..."


def unknown_source(source: str) -> SourceError:
    """Return the error for a source that is neither a name nor a path."""
    reason = f"no file, folder or published model '{shown(source)}'"
    hub = " (nothing is downloaded: give the folder or its config.json)" if source.count("/") == 1 else ""
    return SourceError(f"{reason}{hub}; {_near(source)}", usage=True)
