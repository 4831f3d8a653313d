"""Models made by Python code: a function by its name, a callable, or a module that exists already."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from optstate.memory.errors import SourceError, checked_dtype, in_words
from optstate.memory.model import BuildOptions, Model, ParamShape
from optstate.memory.sources.causal_lm import SDPA, Batch, prepared, token_batch
from optstate.memory.sources.modules import buffer_bytes, copied, default_dtype, in_fake_mode, parameters_of
from optstate.text import shown

__all__ = ["Inputs", "batch_of", "is_name", "of_callable", "of_module", "of_named"]

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

NO_INPUTS = "activations are not estimated: no inputs were given (--input package.module:batch)"


def is_name(source: str) -> bool:
    """Return whether a source is written as `package.module:attribute`."""
    return NAME.fullmatch(source) is not None


def of_named(source: str, inputs: Any, dtype: str) -> Model:
    """Describe the model that `package.module:factory` makes, or is; see `of_callable` and `of_module`."""
    found = _found(source)
    if isinstance(found, nn.Module):
        return of_module(found, inputs, dtype, name=source)
    if not callable(found):
        kind = type(found).__name__
        raise SourceError(f"'{source}' is of type {kind}: give a function that makes the model, or a model", usage=True)
    return of_callable(found, inputs, dtype, name=source)


def of_callable(factory: Callable[[], Any], inputs: Any, dtype: str, name: str = "") -> Model:
    """Describe the model that a function makes, called without arguments on the meta device, in the default dtype.

    Not on fake tensors, which cannot be cast as modules are by `module.to(torch.bfloat16)`.

    Raises:
        SourceError: if it raises, reads values, makes no module, or puts it on an accelerator; the same from `build`.
    """
    name = name or getattr(factory, "__name__", type(factory).__name__)
    batch = batch_of(inputs)
    with default_dtype(checked_dtype(dtype)):
        first = _on_meta(factory, name)

    def build(options: BuildOptions) -> nn.Module:
        made = copied(_on_meta(factory, name)) if in_fake_mode() else _made(factory, name)
        return _optioned(made, options)

    return _model(first, name, f"{name}, a {type(first).__name__}, torch {torch.__version__}", batch, build, dtype)


def of_module(module: nn.Module, inputs: Any, dtype: str, name: str = "") -> Model:
    """Describe a module that exists, with its own dtypes and its own requires_grad.

    The module is only looked at; `build` makes a copy, without values under FakeTensorMode.

    Raises:
        SourceError: if it has no parameters or no dense ones; from `build`, if it cannot be copied.
    """
    name = name or type(module).__name__

    def build(options: BuildOptions) -> nn.Module:
        return _optioned(copied(module), options)

    origin = f"a {type(module).__name__} in memory, torch {torch.__version__}"
    return _model(module, name, origin, batch_of(inputs), build, dtype)


def _model(
    module: nn.Module,
    name: str,
    origin: str,
    inputs: Inputs | None,
    build: Callable[[BuildOptions], nn.Module],
    dtype: str,
) -> Model:
    parameters = parameters_of(module)
    batch = token_batch() if inputs is None and _is_language_model(module) else inputs
    notes = () if batch is not None else (NO_INPUTS,)
    return Model(
        name=name,
        parameters=parameters,
        origin=origin,
        buffer_bytes=buffer_bytes(module),
        build=build,
        batch=batch,
        sized=inputs is None or inputs.sized,
        notes=(*notes, *_dtype_notes(parameters, dtype)),
    )


def _is_language_model(module: Any) -> bool:
    """Return whether a module is one of transformers' with a head over tokens, which takes tokens and labels."""
    head = getattr(module, "get_output_embeddings", None)
    return callable(head) and head() is not None and hasattr(getattr(module, "config", None), "vocab_size")


def _dtype_notes(parameters: tuple[ParamShape, ...], dtype: str) -> tuple[str, ...]:
    others = sorted({param.dtype for param in parameters} - {dtype})
    return (f"weights are {', '.join(others)}, as the module has them, not {dtype}",) if others else ()


# --- calling what was given ---------------------------------------------------------------------------------------


def _found(source: str) -> Any:
    """Import the object a name leads to, also from the working directory, as `python -m` does."""
    module, _, attributes = source.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise SourceError(f"'{source}' cannot be found: {in_words(error)}", usage=True) from error
    except (Exception, SystemExit) as error:
        raise SourceError(f"'{source}': importing its module fails: {in_words(error)}") from error
    finally:
        sys.path.remove(here)
    return found


def _on_meta(factory: Callable[[], Any], name: str) -> nn.Module:
    """Call the function where tensors have no memory, whatever mode the caller is in."""
    with _disable_current_modes(), torch.device("meta"):
        return _made(factory, name)


def _made(factory: Callable[[], Any], name: str) -> nn.Module:
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        hint = "; tensors have no values here: leave reading them and loading weights out of it"
        meta = hint if "meta tensor" in str(error) else ""
        raise SourceError(f"'{name}' fails: {in_words(error)}{meta}") from error
    if not isinstance(made, nn.Module):
        raise SourceError(f"'{name}' returns a {type(made).__name__}: it must return an nn.Module")
    _refuse_accelerators(made, name)
    return made


def _refuse_accelerators(module: nn.Module, name: str) -> None:
    """Refuse tensors on accelerators: an estimate takes no memory there, and nothing fake may claim to be on one."""
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device.type not in ("cpu", "meta"):
            reason = f"'{name}' puts '{shown(key)}' on {tensor.device}"
            raise SourceError(f"{reason}: let it build on the default device, an estimate needs no accelerator")


def _optioned(module: nn.Module, options: BuildOptions) -> nn.Module:
    """Prepare the module as a training run has it, with attention and checkpointing as asked for."""
    choose: Any = getattr(module, "set_attn_implementation", None)
    if choose is not None:
        try:
            choose(options.attention)
        except Exception as error:
            raise SourceError(f"{type(module).__name__} has no {options.attention}: {in_words(error)}") from error
    elif options.attention != SDPA:
        reason = f"a {type(module).__name__} has no set_attn_implementation()"
        raise SourceError(
            f"{reason}: choose {options.attention} attention inside it, and leave it out here", usage=True
        )
    return prepared(module, options.checkpointing)


# --- inputs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """A maker of batches from the inputs that a user gave.

    Attributes:
        given: a function that makes the model's arguments, or the arguments themselves.
        name: of the inputs, for messages.
        sized: whether the function takes batch size and sequence length.
    """

    given: Any
    name: str
    sized: bool

    def __call__(self, batch_size: int, seq_len: int) -> Batch:
        """Return the arguments of the model, positional and named."""
        sizes = (batch_size, seq_len) if self.sized else ()
        given = _called(self.given, self.name, sizes) if callable(self.given) else self.given
        args, kwargs = _arguments(given, self.name)
        return tree_map_only(Tensor, _local, args), tree_map_only(Tensor, _local, kwargs)


def batch_of(inputs: Any) -> Inputs | None:
    """Return what makes batches of the given inputs; None without inputs.

    Inputs are a name or a function of batch size and sequence length, or of nothing; or the arguments themselves, as a
    tensor, a tuple or list of positional ones, a dict of named ones, or a tuple and a dict.

    Raises:
        SourceError: for anything else; what is returned, if what was given raises.
    """
    if inputs is None:
        return None
    name = inputs if isinstance(inputs, str) else getattr(inputs, "__name__", type(inputs).__name__)
    if isinstance(inputs, str):
        if not is_name(inputs):
            raise SourceError(f"inputs '{shown(inputs)}': give package.module:function", usage=True)
        inputs = _found(inputs)
    if not callable(inputs):
        _arguments(inputs, name)
    return Inputs(inputs, name, sized=callable(inputs) and _takes_sizes(inputs))


def _takes_sizes(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(1, 1)
    except (TypeError, ValueError):
        return False
    return True


def _called(function: Callable[..., Any], name: str, sizes: tuple[int, ...]) -> Any:
    try:
        return function(*sizes)
    except (Exception, SystemExit) as error:
        raise SourceError(f"inputs '{name}' fail: {in_words(error)}") from error


def _arguments(given: Any, name: str) -> Batch:
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, tuple | list):
        if len(given) == 2 and isinstance(given[0], tuple | list) and isinstance(given[1], Mapping):
            return tuple(given[0]), dict(given[1])
        return tuple(given), {}
    kind = type(given).__name__
    raise SourceError(f"inputs '{name}' are of type {kind}: a tensor, a tuple, a dict, or a tuple and a dict is needed")


def _local(tensor: Tensor) -> Tensor:
    """Return the tensor, or a new one without values where it cannot be used beside fake ones on the CPU."""
    if tensor.device.type == "cpu" and isinstance(tensor, FakeTensor) == in_fake_mode():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").requires_grad_(tensor.requires_grad)
