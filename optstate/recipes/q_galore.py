"""Q-GaLore (Zhang et al. 2024, arXiv 2407.08296)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.recipes.hidden_matrices import refuse_bad_counts, route_hidden_matrices
from optstate.stores import Block4, Block8, Store
from optstate.weights import Weights

__all__ = ["QGaLore"]


class QGaLore(Optimizer):
    """GaLore with vectors in 4 bits, moments in 8 bits, and vectors made more seldom where they hardly turn.

    Where the first vector kept an absolute cosine of `cos_threshold` on average, the last `queue_size` times, the gap
    of that matrix is multiplied by `gamma_proj`. Cosines, gap and vectors are in the state, so that a run resumes
    exactly. Weights in 8 bits, the paper's third part, are `optstate.weights.quantize_linear(model)`.

    Hidden matrices are projected: matrices whose group declares no role, "matrix" or "query_key"
    (`optstate.declare_roles(model)`). Embeddings, heads, norms, biases and tensors of three or more dimensions get
    AdamW with 8-bit moments and the same numbers. Statistics of fewer than 4096 elements stay in fp32.

    The official code keeps a byte for every 4-bit number, and a vector in full for the cosine, with the sign that the
    decomposition happens to give. Here a byte holds two numbers, with the largest magnitude of a block in fp32 instead
    of a scale and a zero point, and the cosine is that with the vector in 4 bits.

    Args:
        params: as `optstate.Optimizer` takes them, best from `optstate.declare_roles`.
        lr: step size; the paper's runs use 4e-3 (7B) to 1.5e-2 (60M).
        rank: number of vectors. A rank above the shorter side counts as that side.
        update_proj_gap: steps between two sets of vectors at the beginning.
        scale: multiplies the update of projected matrices (alpha).
        betas, eps: as in torch's Adam.
        weight_decay: after the step, by the learning rate alone.
        cos_threshold: mean cosine from which the gap grows.
        gamma_proj: what the gap is multiplied by.
        queue_size: number of cosines that are looked at.
        projector: store of the vectors.
        first, second: stores of the two moments.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.
    """

    made_for_fused_backward: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        cos_threshold: float = 0.4,
        gamma_proj: int = 2,
        queue_size: int = 5,
        projector: Store = Block4(256),
        first: Store = Block8(),
        second: Store = Block8(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        refuse_bad_counts(rank=rank, update_proj_gap=update_proj_gap, gamma_proj=gamma_proj, queue_size=queue_size)
        if not 0 < cos_threshold <= 1:
            raise ValueError(f"cos_threshold={cos_threshold!r}: give a cosine above 0, 1 at most")
        adam = updates.scale_by_adam(first, second, betas=betas, eps=eps)
        decay = updates.decay_weights_after(weight_decay)
        projected = updates.project_lazily(
            adam,
            rank=rank,
            gap=update_proj_gap,
            scale=scale,
            store=projector,
            similarity=cos_threshold,
            queue=queue_size,
            growth=gamma_proj,
        )
        recipe = route_hidden_matrices(updates.chain(projected, decay), updates.chain(adam, decay))
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)
