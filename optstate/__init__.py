"""Composable optimizer state for PyTorch.

Four independent choices make an optimizer: how its running statistics are kept (`stores`), what a gradient goes through
on its way to a step (`updates`), how parameters are written (`weights`), and whether a step happens inside the backward
pass (`fuse_backward`). A combination with a name is a recipe (`recipes`).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optstate import recipes, stores, updates, weights
    from optstate.checkpoint.errors import CheckpointError
    from optstate.checkpoint.live.load import load
    from optstate.checkpoint.live.save import save
    from optstate.memory.estimate import estimate
    from optstate.optimizer.broken_step import InconsistentStateError
    from optstate.optimizer.fused_backward import FusedBackward, fuse_backward
    from optstate.optimizer.optimizer import Optimizer
    from optstate.roles import declare_roles
    from optstate.spec import ParamSpec, is_matrix, is_vector
    from optstate.stores import NonFiniteGradientError
    from optstate.updates.chain import chain, route

__all__ = [
    "CheckpointError",
    "FusedBackward",
    "InconsistentStateError",
    "NonFiniteGradientError",
    "Optimizer",
    "ParamSpec",
    "chain",
    "declare_roles",
    "estimate",
    "fuse_backward",
    "is_matrix",
    "is_vector",
    "load",
    "recipes",
    "route",
    "save",
    "stores",
    "updates",
    "weights",
]

# Names are looked up when first used (PEP 562): the command line reads checkpoints with `optstate.checkpoint` and must
# not wait for torch, which takes ten times as long to import.
_HOMES = {
    "CheckpointError": "optstate.checkpoint.errors",
    "FusedBackward": "optstate.optimizer.fused_backward",
    "InconsistentStateError": "optstate.optimizer.broken_step",
    "NonFiniteGradientError": "optstate.stores",
    "Optimizer": "optstate.optimizer.optimizer",
    "ParamSpec": "optstate.spec",
    "chain": "optstate.updates",
    "declare_roles": "optstate.roles",
    "estimate": "optstate.memory.estimate",
    "fuse_backward": "optstate.optimizer.fused_backward",
    "is_matrix": "optstate.spec",
    "is_vector": "optstate.spec",
    "load": "optstate.checkpoint.live.load",
    "route": "optstate.updates",
    "save": "optstate.checkpoint.live.save",
}
_MODULES = ("recipes", "stores", "updates", "weights")

if not TYPE_CHECKING:  # a type checker takes any name for granted where it sees a `__getattr__`

    def __getattr__(name):
        if name in _MODULES:
            return import_module(f"optstate.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'optstate' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
