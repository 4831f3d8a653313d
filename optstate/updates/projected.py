"""The base of transforms around a chain that works on a projection of the gradient, and the vectors they project on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from optstate.kernels import Noise
from optstate.spec import ParamSpec
from optstate.stores import Partial, Requests, Whole
from optstate.updates.around import Around
from optstate.updates.base import Context

__all__ = ["Projected", "iterate_basis", "make_random_vectors", "require_counts", "take_singular_vectors"]


@dataclass(frozen=True)
class Projected(Around):
    """The base of transforms whose inner chain sees the gradient projected on `rank` vectors of its shorter side.

    Of an `[m, n]` matrix with m >= n the vectors are `[rank, n]` and multiply from the right, else `[m, rank]` from the
    left. A rank above the shorter side counts as that side. Only for matrices: route other parameters elsewhere.

    Args:
        inner: the chain that sees the projected gradient.
        rank: number of vectors.

    Raises:
        ValueError: for a rank that is not a positive whole number, and where a parameter is planned that is no matrix.
    """

    rank: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "rank")

    def is_right(self, spec: ParamSpec) -> bool:
        """Return whether the vectors multiply from the right, as columns are the shorter side."""
        return spec.shape[0] >= spec.shape[1]

    def basis_spec(self, spec: ParamSpec, count: int = 0) -> ParamSpec:
        """Return the specification of `count` vectors along the shorter side; of `rank` vectors for 0.

        Raises:
            ValueError: if the parameter is no matrix.
        """
        if spec.ndim != 2:
            raise ValueError(
                f"{type(self).__name__} projects matrices, and {spec.name!r} has {spec.ndim} dimensions: give it "
                "another chain, with optstate.route"
            )
        m, n = spec.shape
        count = count or min(self.rank, m, n)
        return spec.like((count, n), (None, 1)) if self.is_right(spec) else spec.like((m, count), (0, None))

    def space(self, spec: ParamSpec) -> ParamSpec:
        rank = min(self.basis_spec(spec).shape)
        m, n = spec.shape
        return spec.like((m, rank), (0, None)) if self.is_right(spec) else spec.like((rank, n), (None, 1))

    def down(self, value: Tensor, basis: Tensor, spec: ParamSpec) -> Requests[Tensor]:
        """Project a value of the parameter's shape on a basis, parts of both; drive with `yield from`."""
        request = Partial(value @ basis.T, -1) if self.is_right(spec) else Partial(basis.T @ value, -2)
        return cast(Tensor, (yield request))

    def up(self, low: Tensor, basis: Tensor, spec: ParamSpec) -> Tensor:
        """Return a projected value in the parameter's shape again."""
        return low @ basis if self.is_right(spec) else basis @ low


# --- bases --------------------------------------------------------------------------------------------------------


def take_singular_vectors(of: Projected, value: Tensor, spec: ParamSpec) -> Requests[Tensor]:
    """Return this device's part of the leading singular vectors. Gathers the value, and waits for an accelerator."""
    u, _, vh = torch.linalg.svd((yield Whole(value, spec)), full_matrices=False)
    basis = of.basis_spec(spec)
    rank = min(basis.shape)
    return basis.part(vh[:rank] if of.is_right(spec) else u[:, :rank])


def make_random_vectors(of: Projected, ctx: Context, count: int, step: int) -> Tensor:
    """Return this device's part of `count` vectors of normal numbers over sqrt(count), which are those of a step."""
    spec = of.basis_spec(ctx.spec, count)
    noise = Noise(f"{ctx.spec.name}/projector", step, region=spec.region)
    vectors = noise.normal(spec.local_numel, ctx.param.device).view(spec.local_shape).div_(count**0.5)
    return vectors.to(spec.accumulator)


def iterate_basis(
    of: Projected, value: Tensor, start: Tensor, spec: ParamSpec, times: int, rank: int = 0
) -> Requests[Tensor]:
    """Return this device's part of a basis after some power iterations, `start (g^T g)^times`, made orthonormal.

    rank: how many of the leading vectors are returned; 0 for as many as there are. Waits for an accelerator.
    """
    right, basis = of.is_right(spec), start
    for i in range(times):
        low = yield from of.down(value, basis, spec)
        back = yield (Partial(low.T @ value, -2) if right else Partial(value @ low.T, -1))
        rows = (back if right else back.T).double()
        gram = cast(Tensor, (yield Partial(rows @ rows.T, -1 if right else -2)))
        rows = (turn_to_leading(gram, rank) if rank and i + 1 == times else make_orthonormal(gram)) @ rows
        basis = (rows if right else rows.T).to(value.dtype)
    return basis


def make_orthonormal(gram: Tensor) -> Tensor:
    """Return the matrix that makes vectors with this Gram matrix orthonormal, one after the other, as QR does.

    A vector that adds next to nothing to those before becomes zero, and no arbitrary one.
    """
    size = gram.diagonal().amax().clamp(min=1e-300)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    lower = torch.linalg.cholesky_ex(gram + identity * (size * 1e-14))[0]
    made: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    is_lost = lower.diagonal().square() <= size * 1e-12
    return made.masked_fill_(is_lost.unsqueeze(-1), 0.0).nan_to_num_(0.0)


def turn_to_leading(gram: Tensor, rank: int) -> Tensor:
    """Return the matrix that turns vectors with this Gram matrix into their leading singular vectors."""
    values, turn = torch.linalg.eigh(gram)
    values, turn = values.flip(0)[:rank], turn.flip(1)[:, :rank]
    is_lost = values <= values[:1].clamp(min=1e-300) * 1e-12
    largest = turn.gather(0, turn.abs().argmax(0, keepdim=True))  # its sign is arbitrary: positive from here on
    made: Tensor = turn * largest.sign() * torch.where(is_lost, 0.0, values.clamp(min=1e-300).rsqrt())
    return made.T


def require_counts(of: Any, *names: str) -> None:
    """Raise ValueError unless these fields are whole numbers of 1 at least."""
    for name in names:
        value = getattr(of, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number, 1 at least")
