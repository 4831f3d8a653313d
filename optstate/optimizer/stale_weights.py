"""Refusing to read a weight in the backward pass that has updated it already.

Autograd sees to the values that it saved itself: each carries the version of its tensor. It does not see what Python
code reads anew while the pass runs: a checkpointed block that is computed again with a weight it uses without gradient,
or a `torch.autograd.Function` that keeps a weight in its context. Both would compute with the new value.

Only the parameter itself is watched: a `detach()` of it that was made in the forward pass and handed on as an argument
is another tensor with the same values, and reading that one again is not noticed. Such a one is also what hooks for
saved tensors get, and torch does not check the versions of what these give back.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["hide_weight", "show_weight"]

# What tells about a tensor, or hangs something on it, without its values. Attributes are named by their getters.
_WITHOUT_VALUES = frozenset(
    {
        *("device", "dtype", "grad", "grad_fn", "grad_dtype", "is_leaf", "layout", "names", "ndim", "output_nr"),
        *("requires_grad", "retains_grad", "shape", "itemsize", "nbytes", "name", "volatile", "_version", "_base"),
        *("_backward_hooks", "_post_accumulate_grad_hooks", "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_nested"),
        *("is_quantized", "is_mps", "is_xla", "is_xpu", "is_mkldnn", "is_sparse_csr", "is_vulkan", "is_maia"),
        *("dim", "size", "stride", "numel", "nelement", "element_size", "storage_offset", "is_contiguous", "__len__"),
        *("is_floating_point", "is_complex", "is_signed", "is_inference", "get_device", "__repr__", "__hash__"),
        *("register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "untyped_storage"),
    }
)


class _Guarded:
    """A tensor between its update and the end of the backward pass: what Python code does with it comes here."""

    def __deepcopy__(self, memo: Any) -> Any:
        copied = super().__deepcopy__(memo)  # type: ignore[misc]
        show_weight(copied)
        return copied

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        sets = name in ("__set__", "__delete__")
        if name == "__get__":
            name = func.__self__.__name__
        if torch._C._current_graph_task_id() < 0:  # no pass runs here: the one that updated them ended, well or not
            for item in _hidden_in(args, kwargs):
                show_weight(item)
        elif not sets and name not in _WITHOUT_VALUES and (items := _of_this_pass(_hidden_in(args, kwargs))):
            which = " and ".join(_NAMES.get(id(item), "a weight") for item in items)
            raise RuntimeError(
                f"{name}() would read {which} in the backward pass that has updated it already, and get the new value "
                "for the old one. If checkpointed parts share a layer, use checkpoint(..., use_reentrant=False); if a "
                "checkpointed block uses the weight without gradient, compute that outside the block; if an "
                "autograd.Function keeps the weight in its context, use save_for_backward(); if a hook only looks at "
                "it, look after step(). Or leave the update to step()"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _hidden_in(args: Any, kwargs: Any) -> list[Tensor]:
    return [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor) and isinstance(item, _Guarded)]


def _of_this_pass(hidden: list[Tensor]) -> list[Tensor]:
    """Those that the pass of this thread may have updated: not those of a pass that another thread called.

    On a CPU the thread that calls backward() runs all of it. Threads of autograd itself serve the passes of all.
    """
    here = threading.current_thread()
    if isinstance(here, threading._DummyThread):
        return hidden
    return [item for item in hidden if _THREADS.get(id(item), here) in (here, None)]


class _UpdatedParameter(_Guarded, nn.Parameter):
    pass


class _UpdatedTensor(_Guarded, Tensor):
    pass


_WHILE_HIDDEN: dict[type, type] = {nn.Parameter: _UpdatedParameter, Tensor: _UpdatedTensor}
_AFTERWARDS = {hidden: kind for kind, hidden in _WHILE_HIDDEN.items()}


_NAMES: dict[int, str] = {}
_THREADS: dict[int, threading.Thread | None] = {}
"""The thread in which a tensor was updated, None for one of autograd's own."""


def hide_weight(param: Tensor, name: str) -> None:
    """Make every reading of a parameter's values in a backward pass fail, until `show`.

    Parameters of other people's classes, distributed ones among them, stay as they are.
    """
    hidden = _WHILE_HIDDEN.get(type(param))
    if hidden is not None:
        thread = threading.current_thread()
        _NAMES[id(param)] = repr(name)
        _THREADS[id(param)] = None if isinstance(thread, threading._DummyThread) else thread
        param.__class__ = hidden


def show_weight(param: Tensor) -> None:
    """Let a parameter be read again."""
    kind = _AFTERWARDS.get(type(param))
    if kind is not None:
        param.__class__ = kind
        _NAMES.pop(id(param), None)
        _THREADS.pop(id(param), None)
