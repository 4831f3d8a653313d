"""Composable optimizer state for PyTorch: choose how statistics are kept, what a gradient goes through, how weights
are written, and whether the update happens inside the backward pass."""

from optstate import recipes, stores, updates, weights
from optstate.backward import FusedBackward, fuse_backward
from optstate.optimizer import InconsistentStateError, Optimizer
from optstate.roles import declare_roles
from optstate.spec import ParamSpec, is_matrix, is_vector
from optstate.stores import NonFiniteGradientError
from optstate.updates import chain, route

__all__ = [
    "FusedBackward",
    "InconsistentStateError",
    "NonFiniteGradientError",
    "Optimizer",
    "ParamSpec",
    "chain",
    "declare_roles",
    "fuse_backward",
    "is_matrix",
    "is_vector",
    "recipes",
    "route",
    "stores",
    "updates",
    "weights",
]
