"""The parameters of Llama, Mistral, Qwen and GPT-2 models by their config, without transformers.

Order and names are those of transformers' classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from optstate.memory.errors import SourceError
from optstate.text import shown

__all__ = ["ARCHITECTURES", "check_number", "check_sizes", "list_parameters"]

Shapes = Iterator[tuple[str, tuple[int, ...]]]
Config = Mapping[str, Any]

LARGEST = {
    "layers": (("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2_000),
    "heads": (("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads"), 100_000),
    "experts": (("num_experts", "num_local_experts", "n_routed_experts"), 100_000),
    "width": (
        ("hidden_size", "intermediate_size", "head_dim", "n_embd", "n_embed", "n_inner", "d_model", "d_ff", "ffn_dim"),
        10_000_000,
    ),
    "tokens": (("vocab_size", "max_position_embeddings", "n_positions"), 1_000_000_000),
}
"""Keys of sizes in a config, each with a bound far above any model's: a larger size is a slip of the pen."""


COUNT = re.compile(r"(^|_)(num|n)_|_(layers|heads|experts|groups|blocks|stages|codebooks)$")
OF_TEXT = re.compile(r"token|position|embed|vocab|bucket|length|size|ctx|width|dim")
"""Patterns of keys that count modules of a model, of which there are few, and of keys that do not."""

COUNTED, IN_LISTS, MOST = 100_000, 10_000_000, 10**12


def check_sizes(config: Config) -> None:
    """Raise SourceError for a size that no model can have: no whole number, below one, or beyond measure."""
    for what, (keys, largest) in LARGEST.items():
        for key in keys:
            value = config.get(key)
            if value is None or (isinstance(value, list) and config.get("model_type") not in ARCHITECTURES):
                continue  # a list has a size for each layer, in types that only transformers knows
            if type(value) is not int:
                raise SourceError(f"{key} is {shown(repr(value))}: it must be a whole number")
            if not 1 <= value <= largest:
                raise SourceError(f"{key} is {value}: no model has so {'few' if value < 1 else 'many'} {what}")


def check_number(key: str, value: Any) -> None:
    """Raise SourceError for a whole number that no config of a model has, whatever it is for.

    What is made for each of so many, lists of kinds of layers or of names, would fill the memory.
    """
    for number in _numbers(value):
        largest = (
            IN_LISTS if isinstance(value, list) else MOST if not COUNT.search(key) or OF_TEXT.search(key) else COUNTED
        )
        if abs(number) > largest:
            raise SourceError(f"{shown(key)} has {shown(str(number))}: no model has a number of this size there")


def _numbers(value: Any) -> Iterator[int]:
    """Yield the whole numbers in a value and in lists in it."""
    if type(value) is int:
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)


def list_parameters(config: Config) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and shape of every parameter, tied ones once, of a model whose model_type is in `ARCHITECTURES`.

    Raises:
        SourceError: for sizes that are missing or impossible.
    """
    check_sizes(config)
    return list(ARCHITECTURES[config["model_type"]](config))


def _llama(config: Config) -> Shapes:
    """Yield Llama's shapes: biases if `attention_bias` and `mlp_bias` are set, separate heads for keys and values."""
    bias = _flag(config, "attention_bias")
    return _decoder(config, query_bias=bias, output_bias=bias, mlp_bias=_flag(config, "mlp_bias"))


def _mistral(config: Config) -> Shapes:
    """Yield Mistral's shapes: 8 heads for keys and values unless the config says otherwise."""
    return _decoder({"num_key_value_heads": 8, **config})


def _qwen2(config: Config) -> Shapes:
    """Yield the shapes of Qwen 2 and 2.5: biases on queries, keys and values."""
    return _decoder(config, query_bias=True)


def _qwen3(config: Config) -> Shapes:
    """Yield the shapes of Qwen 3: norms of queries and keys, heads of 128 unless the config says otherwise."""
    bias = _flag(config, "attention_bias")
    return _decoder({"head_dim": 128, **config}, query_bias=bias, output_bias=bias, head_norms=True)


def _decoder(
    config: Config,
    query_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    head_norms: bool = False,
) -> Shapes:
    hidden, inner, vocab = (_size(config, key) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    size, heads, keys = _heads(config)
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(_size(config, "num_hidden_layers")):
        layer = f"model.layers.{i}"
        yield from _linear(f"{layer}.self_attn.q_proj", hidden, heads * size, query_bias)
        yield from _linear(f"{layer}.self_attn.k_proj", hidden, keys * size, query_bias)
        yield from _linear(f"{layer}.self_attn.v_proj", hidden, keys * size, query_bias)
        yield from _linear(f"{layer}.self_attn.o_proj", heads * size, hidden, output_bias)
        if head_norms:
            yield f"{layer}.self_attn.q_norm.weight", (size,)
            yield f"{layer}.self_attn.k_norm.weight", (size,)
        yield from _linear(f"{layer}.mlp.gate_proj", hidden, inner, mlp_bias)
        yield from _linear(f"{layer}.mlp.up_proj", hidden, inner, mlp_bias)
        yield from _linear(f"{layer}.mlp.down_proj", inner, hidden, mlp_bias)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not _flag(config, "tie_word_embeddings"):
        yield "lm_head.weight", (vocab, hidden)


def _heads(config: Config) -> tuple[int, int, int]:
    """Return the size of a head, how many there are for queries, and for keys and values."""
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    keys = _optional(config, "num_key_value_heads") or heads
    if heads % keys:
        raise SourceError(f"num_key_value_heads is {keys}, which does not divide the {heads} attention heads")
    size = _optional(config, "head_dim")
    if size is None and hidden % heads:
        raise SourceError(f"hidden_size is {hidden}, which {heads} attention heads do not divide")
    return size or hidden // heads, heads, keys


def _gpt2(config: Config) -> Shapes:
    """Yield GPT-2's shapes: learned positions, norms with biases, projections as [inputs, outputs], a tied head."""
    if _flag(config, "add_cross_attention"):
        raise SourceError("add_cross_attention is true: only plain GPT-2 is known without transformers")
    vocab, hidden = _size(config, "vocab_size"), _size(config, "n_embd", "hidden_size")
    heads = _size(config, "n_head", "num_attention_heads")
    if hidden % heads:
        raise SourceError(f"n_embd is {hidden}, which {heads} attention heads do not divide")
    inner = _optional(config, "n_inner") or 4 * hidden
    yield "transformer.wte.weight", (vocab, hidden)
    yield "transformer.wpe.weight", (_size(config, "n_positions", "max_position_embeddings"), hidden)
    for i in range(_size(config, "n_layer", "num_hidden_layers")):
        layer = f"transformer.h.{i}"
        yield from _norm(f"{layer}.ln_1", hidden)
        yield from _conv1d(f"{layer}.attn.c_attn", hidden, 3 * hidden)
        yield from _conv1d(f"{layer}.attn.c_proj", hidden, hidden)
        yield from _norm(f"{layer}.ln_2", hidden)
        yield from _conv1d(f"{layer}.mlp.c_fc", hidden, inner)
        yield from _conv1d(f"{layer}.mlp.c_proj", inner, hidden)
    yield from _norm("transformer.ln_f", hidden)
    if not _flag(config, "tie_word_embeddings", default=True):
        yield "lm_head.weight", (vocab, hidden)


ARCHITECTURES: Mapping[str, Callable[[Config], Shapes]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
}
"""Functions that yield a model's shapes, by the config's model_type."""


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> Shapes:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _conv1d(name: str, inputs: int, outputs: int) -> Shapes:
    yield f"{name}.weight", (inputs, outputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, size: int) -> Shapes:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def _size(config: Config, *keys: str) -> int:
    """Return a size that the config must give, under one of these names."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            return int(value)
    raise SourceError(f"the config of a {config['model_type']} has no {keys[0]}")


def _optional(config: Config, key: str) -> int | None:
    value = config.get(key)
    return None if value is None else int(value)


def _flag(config: Config, key: str, default: bool = False) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise SourceError(f"{key} is {shown(repr(value))}: it must be true or false")
    return value
