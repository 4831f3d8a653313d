"""Declare the role of each parameter of a model (embedding, head, norm ...) from the modules that hold it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from optstate.spec import ROLES, ParamSpec

__all__ = ["declare_roles"]

# Child attributes that hold the projection to queries and the one to keys, as models spell them: Llama and most others,
# BERT, Meta's Llama, diffusers, DistilBERT, T5, DeBERTa-v2, Conformers.
QUERY_KEY = (
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("wq", "wk"),
    ("to_q", "to_k"),
    ("q_lin", "k_lin"),
    ("q", "k"),
    ("query_proj", "key_proj"),
    ("linear_q", "linear_k"),
)
HEAD_SIZES = ("head_dim", "attention_head_size")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")

TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
LINEAR_MAPS = (nn.Linear, nn.Bilinear, _ConvNd)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

Declaration = tuple[str, int | None]
"""A role, and the rows of one attention head if the role is "query_key"."""


def declare_roles(model: nn.Module) -> list[dict[str, Any]]:
    """Return param groups that declare the role of each parameter of a model, for any optimizer of this library.

    Every parameter of `model.named_parameters()` gets a role, frozen parameters included. A group is
    `{"params": [(name, param), ...], "role": role}`, with `"head_size"` where there is one; add hyper-parameters to it
    as to any group. Groups come in the order below, parameters in the model's order.

    Roles are read off module types and exact attribute names, never off parts of a parameter's name:

    * "embedding": the weight of an `nn.Embedding` or `nn.EmbeddingBag`.
    * "head": the weight of the output projection, an `nn.Linear` that is what `get_output_embeddings()` returns
      (transformers), or, in a model without that method, the last `nn.Linear` directly under the root if it has as many
      outputs as an embedding has entries. Wrappers with a single child are looked through to find the root.
    * "query_key", with head_size, the rows of one head: the weights of two `nn.Linear` children named as the query and
      key of one attention module (`q_proj` and `k_proj`, `query` and `key`, `wq` and `wk`, `to_q` and `to_k`, `q_lin`
      and `k_lin`, `q` and `k`, `query_proj` and `key_proj`, `linear_q` and `linear_k`), if the module also declares its
      heads: by an integer `head_dim` or `attention_head_size`, else by `num_heads`, `num_attention_heads`, `n_heads`,
      `n_head` or `heads`, among which the query's rows are divided. Keys of grouped-query attention have fewer heads of
      the same size. `nn.MultiheadAttention`'s `q_proj_weight` and `k_proj_weight` count, too.
    * "norm": the weight of torch's normalisation layers, and of any module without children that holds a 1-D `weight`,
      or that and a 1-D `bias`, and nothing else (`LlamaRMSNorm`), `nn.PReLU` excepted.
    * "bias": the bias of these, a 1-D `bias` beside a weight of two or more dimensions, and `nn.MultiheadAttention`'s
      `in_proj_bias`.
    * "matrix" and "vector": everything else, as if nothing had been declared.

    A head tied to an embedding is one parameter and its role is "embedding": its name in `model.named_parameters()`
    is usually the embedding's, and its rows are tokens either way.

    A projection that holds queries, keys and values in one (`in_proj_weight`, `qkv_proj`, `query_key_value`, `c_attn`)
    is a "matrix": its value rows are neither queries nor keys, and blocks of one row, which a matrix gets in
    Adam-mini, are finer than heads. So is any projection that is no `nn.Linear`, since only there the rows are known to
    be outputs: GPT-2's `Conv1D` stores `[inputs, outputs]`. And so is a query without its key, as in multi-head latent
    attention, where `head_dim` may mean another size.

    Args:
        model: any module, wrapped or not.

    Returns:
        The groups, none of them empty, with every parameter in exactly one.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if a module declares heads that do not divide the rows of its query or key weight.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"declare_roles() got a {type(model).__name__}: give the model itself")
    found: dict[Tensor, Declaration] = {}
    for param, declaration in _declarations(model):
        if param not in found or ROLES.index(declaration[0]) < ROLES.index(found[param][0]):
            found[param] = declaration
    members: dict[Declaration, list[tuple[str, Tensor]]] = {}
    for name, param in model.named_parameters():
        undeclared = ParamSpec(name=name, shape=tuple(param.shape), dtype=param.dtype).role
        members.setdefault(found.get(param, (undeclared, None)), []).append((name, param))
    return [
        {"params": members[role, size], "role": role, **({"head_size": size} if size is not None else {})}
        for role, size in sorted(members, key=lambda declaration: ROLES.index(declaration[0]))
    ]


def _declarations(model: nn.Module) -> Iterator[tuple[Tensor, Declaration]]:
    """Yield every role that a module gives one of its parameters; a tied parameter may come several times."""
    for linear in _output_projections(model):
        yield from ((weight, ("head", None)) for weight in _own(linear, "weight"))
    for path, module in model.named_modules():
        if isinstance(module, EMBEDDINGS):
            yield from ((weight, ("embedding", None)) for weight in _own(module, "weight"))
        if _is_norm(module):
            yield from ((weight, ("norm", None)) for weight in _own(module, "weight"))
        yield from ((bias, ("bias", None)) for bias in _biases(module))
        yield from ((weight, ("query_key", size)) for weight, size in _queries_and_keys(path, module))


def _own(module: nn.Module, *names: str) -> list[nn.Parameter]:
    """Return the module's own parameters of these names, without parametrized weights, which are computed."""
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    return [own[name] for name in names if name in own]


def _output_projections(model: nn.Module) -> list[nn.Linear]:
    """Return the output projections of a model: the layers whose weights get the role "head"."""
    modules: list[Any] = list(model.modules())
    answers = [module.get_output_embeddings() for module in modules if _offers_output_embeddings(module)]
    root = model
    while len(children := list(root.children())) == 1 and not list(root.parameters(recurse=False)):
        root = children[0]  # DistributedDataParallel, torch.compile, a training wrapper
    if not _offers_output_embeddings(root):  # else its answer counts, even None: a classifier's labels are no tokens
        entries = {module.num_embeddings for module in modules if isinstance(module, EMBEDDINGS)}
        last = [child for child in root.children() if isinstance(child, nn.Linear)][-1:]
        answers += [linear for linear in last if linear.out_features in entries]
    return [answer for answer in answers if isinstance(answer, nn.Linear)]


def _offers_output_embeddings(module: Any) -> bool:
    return callable(getattr(module, "get_output_embeddings", None))


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, TORCH_NORMS):
        return True
    if isinstance(module, (*LINEAR_MAPS, *EMBEDDINGS, nn.PReLU)) or list(module.children()):
        return False
    own = dict(module.named_parameters(recurse=False))
    return set(own) in ({"weight"}, {"weight", "bias"}) and all(param.ndim == 1 for param in own.values())


def _biases(module: nn.Module) -> list[nn.Parameter]:
    if isinstance(module, nn.MultiheadAttention):
        return _own(module, "in_proj_bias")
    if _is_norm(module):
        return _own(module, "bias")
    if isinstance(module, LINEAR_MAPS) or any(weight.ndim >= 2 for weight in _own(module, "weight")):
        return [bias for bias in _own(module, "bias") if bias.ndim == 1]
    return []


def _queries_and_keys(path: str, module: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Yield the query and key weights of an attention module that declares its heads, with the rows of one head.

    Raises:
        ValueError: if the declared heads do not divide the rows of a weight.
    """
    for labels, weights in _query_key_pairs(module):
        # Packed quantised weights have another shape than the matrix they stand for, and do not train.
        if len(weights) < 2 or not all(weight.is_floating_point() for weight in weights):
            continue
        attribute, size = _declared(module, HEAD_SIZES)
        if not size:
            attribute, count = _declared(module, HEAD_COUNTS)
            if not count:
                continue
            size, rest = divmod(weights[0].shape[0], count)
            if rest or not size:
                raise _no_heads(path, labels[0], weights[0], module, attribute)
        for label, weight in zip(labels, weights, strict=True):
            if weight.shape[0] % size:
                raise _no_heads(path, label, weight, module, attribute, size)
            yield weight, size


def _query_key_pairs(module: nn.Module) -> Iterator[tuple[tuple[str, str], list[nn.Parameter]]]:
    """Yield the names and the weights of a query and its key; a weight that is no parameter is left out."""
    if isinstance(module, nn.MultiheadAttention):
        labels = ("q_proj_weight", "k_proj_weight")
        yield labels, _own(module, *labels)
    for query, key in QUERY_KEY:
        children = [getattr(module, query, None), getattr(module, key, None)]
        linears = [child for child in children if isinstance(child, nn.Linear)]
        if len(linears) == 2:
            yield (
                (f"{query}.weight", f"{key}.weight"),
                [weight for child in linears for weight in _own(child, "weight")],
            )


def _declared(module: nn.Module, attributes: tuple[str, ...]) -> tuple[str, int]:
    """Return the name and the value of the first of these attributes that is a positive integer, else "" and 0."""
    for attribute in attributes:
        value = getattr(module, attribute, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return attribute, value
    return "", 0


def _no_heads(
    path: str, label: str, weight: Tensor, module: nn.Module, attribute: str, size: int | None = None
) -> ValueError:
    heads = f"heads of {size} rows" if size else f"{getattr(module, attribute)} equal heads"
    return ValueError(
        f"{f'{path}.{label}'.lstrip('.')!r} of shape {tuple(weight.shape)} cannot be split into {heads}, as "
        f"{type(module).__name__} declares by {attribute}={getattr(module, attribute)}: correct the attribute, or "
        "write the param groups by hand, with the role 'query_key' and the right head_size"
    )
