"""What a whole step is: one kernel, or a few, that do all that a chain does to a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from optstate.kernels.native import StepKind
from optstate.updates import Context

__all__ = ["TableStep", "WholeStep", "is_plain"]


class WholeStep(Protocol):
    """A kernel that was found for the chain, the stores, the weights and the dtype of one parameter.

    Its result is that of the transforms, up to the order in which sums are added and roundings are made.
    """

    @property
    def words(self) -> str:
        """What the plan says of it."""
        ...

    @property
    def checks_gradient(self) -> bool:
        """Whether the kernel itself refuses a gradient that is not finite, before anything is written."""
        ...

    @property
    def passes(self) -> int:
        """Number of times that it goes over the parameter, each a launch on an accelerator."""
        ...

    @property
    def moved_bytes(self) -> int:
        """Bytes that it reads and writes in memory, of a parameter that does not fit a cache."""
        ...

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter and its state; return False, with nothing written, where this step needs the transforms.

        Args:
            state: the parameter's state by key, parts on this device.
            ctx: of the step, with the parameter's part on this device.
        """
        ...


@runtime_checkable
class TableStep(WholeStep, Protocol):
    """A compiled step that many small parameters can make in one call, which takes a table of structures."""

    @property
    def kind(self) -> StepKind | None:
        """What a table has in the place of the parameter; None if the step is made alone."""
        ...

    def fill(self, state: Mapping[str, Any], ctx: Context) -> Any:
        """Return the structure of a step without room for sums, or None where this step needs the transforms."""
        ...

    def largest(self, ctx: Context) -> float:
        """Return the largest magnitude of a gradient's element that a table lets pass; negative if it need not look."""
        ...

    def room(self, structure: Any) -> int:
        """Return how many numbers of 8 bytes the sums of a step take."""
        ...

    def with_names(self, structure: Any, name: str) -> None:
        """Put the keys of random bits into a structure: those of names alone, whatever the step."""
        ...


def is_plain(*tensors: Tensor) -> bool:
    """Return whether C code may be given the addresses of these tensors: on the CPU, real, and without gaps."""
    for tensor in tensors:  # a loop, not a generator: every call counts where parameters are small
        kind = type(tensor)
        if (kind is not Tensor and kind is not nn.Parameter) or tensor.device.type != "cpu":
            return False
        if not tensor.is_contiguous() or tensor.is_neg():  # numbers that are read with the other sign
            return False
    return True
