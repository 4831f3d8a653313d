"""Check that optimizers compared for speed compute the same: updates of several steps, and how bf16 is rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import peers
import torch
from shapes import SETS, gradients_of, module_of
from timing import DTYPES
from torch import Tensor, nn

STEPS = 4
ADALOMO_LR, LOMO_LR, ADAMW_LR = 1e-2, 0.1, 1e-3
EXACT_ADALOMO = "AdaLomo's rule in fp64"


@dataclass(frozen=True)
class Pair:
    """Two optimizers with one rule, and how far apart their total updates may be after `STEPS` steps.

    fp32, bf16: largest relative L2 distance of all parameters but the embedding together, and of the embedding,
        which is by far the largest parameter. None: not compared.

    In fp32 only the order of operations differs. In bf16 a result near the middle between two numbers is rounded up
    by one and down by the other.
    """

    name: str
    reference: str
    lr: float
    fp32: tuple[float, float]
    bf16: tuple[float, float] | None


PAIRS = (
    Pair(peers.OUR_ADALOMO, EXACT_ADALOMO, ADALOMO_LR, fp32=(1e-5, 1e-5), bf16=(2e-3, 2e-3)),
    # lomo-optim and pytorch_optimizer take norms with torch.norm, which adds fp32 squares one after the other: 5e-4
    # too small for the embedding's 12 million elements, and with it the step, which is scaled by the weights' RMS.
    Pair(peers.OUR_ADALOMO, peers.LOMO_ADALOMO, ADALOMO_LR, fp32=(1e-5, 2e-3), bf16=(2e-3, 2e-2)),
    Pair("pytorch_optimizer AdaLOMO", peers.LOMO_ADALOMO, ADALOMO_LR, fp32=(1e-5, 1e-5), bf16=(2e-3, 2e-3)),
    Pair(peers.OUR_LOMO, peers.LOMO_LOMO, LOMO_LR, fp32=(1e-5, 1e-5), bf16=(2e-3, 2e-3)),
    # torch's SGD adds `alpha * grad` with alpha rounded to bf16: a learning rate that is wrong by up to 2**-9 and
    # rounds one element in 25 the other way.
    Pair(peers.SGD_LOOP, peers.LOMO_LOMO, LOMO_LR, fp32=(1e-5, 1e-5), bf16=(3e-2, 3e-2)),
    Pair(peers.SGD_FUSED, peers.LOMO_LOMO, LOMO_LR, fp32=(1e-5, 1e-5), bf16=(3e-2, 3e-2)),
    # torch keeps AdamW's moments in bf16 where ours are fp32, so only fp32 compares.
    Pair("optstate AdamW", peers.ADAMW_FUSED, ADAMW_LR, fp32=(1e-5, 1e-5), bf16=None),
)

MAY_NOT_UPDATE = {(peers.SGD_FUSED, "bf16")}
"""Optimizers that may leave parameters as they are, which the report says instead of stopping.

torch 2.13's fused SGD computes bf16 and fp16 updates on a CPU and does not store them, but for the last few elements of
a tensor; its time is no yardstick then.
"""


def compare_updates() -> list[dict[str, Any]]:
    """Return one row per pair, dtype and part; `unchanged` is the fraction of elements that no step moved."""
    rows = []
    for dtype_name, dtype in DTYPES.items():
        start = [p.detach().clone() for p in module_of(SETS[0].shapes(), dtype).parameters()]
        finals: dict[str, list[Tensor]] = {}
        for pair in PAIRS:
            bounds = getattr(pair, dtype_name)
            if bounds is None:
                continue
            for name in (pair.name, pair.reference):
                if name not in finals:
                    finals[name] = after_steps(name, dtype, pair.lr)
            ours, theirs = finals[pair.name], finals[pair.reference]
            parts = (("layers", slice(1, None)), ("embedding", slice(1)))
            for (part, at), bound in zip(parts, bounds, strict=True):
                row = {"name": pair.name, "reference": pair.reference, "dtype": dtype_name, "part": part}
                rows.append({**row, **judge(pair, dtype_name, ours[at], theirs[at], start[at], bound)})
    return rows


def judge(
    pair: Pair, dtype_name: str, ours: list[Tensor], theirs: list[Tensor], start: list[Tensor], bound: float
) -> dict[str, Any]:
    """Return how far apart the parameters of two optimizers end, and whether the distance is within the bound."""
    distance, unchanged = relative_l2(ours, theirs, start), fraction_equal(ours, start)
    verdict = "agree" if distance <= bound else "DIFFER"
    if unchanged > 0.999 and (pair.name, dtype_name) in MAY_NOT_UPDATE:
        verdict = "no update"
    return {"relative_l2": distance, "bound": bound, "unchanged": unchanged, "verdict": verdict}


def after_steps(name: str, dtype: torch.dtype, lr: float, steps: int = STEPS) -> list[Tensor]:
    """Return the 25M set after `steps` steps of the named optimizer; weights and gradients are the same for all."""
    module = module_of(SETS[0].shapes(), dtype)
    build = exact_adalomo if name == EXACT_ADALOMO else peers.by_name([name], dtype)[0].build
    runner = build(module, lr)
    for step in range(steps):
        runner.load(gradients_of(module, seed=1 + step))
        runner.step()
    return [p.detach() for p in module.parameters()]


def exact_adalomo(module: nn.Module, lr: float) -> peers.Runner:
    """Build AdaLomo as written down in fp64, each step rounded once to the parameters' dtype."""
    params = list(module.parameters())
    means = {p: [torch.zeros(shape, dtype=torch.float64) for shape in mean_shapes(p)] for p in params}
    steps = count(1)

    @torch.no_grad()
    def step() -> None:
        weight = next(steps) ** -0.8
        for param in params:
            grad, value = param.grad.double(), param.double()
            for mean in means[param]:
                mean.lerp_((grad.square() + 1e-30).sum_to_size(mean.shape) * (mean.numel() / grad.numel()), weight)
            update = grad * (means[param][0] / means[param][0].mean()).rsqrt() if param.ndim > 1 else grad
            update = update * means[param][-1].rsqrt()
            update = update / rms(update).clamp(min=1.0)
            param.copy_(value - lr * rms(value).clamp(min=1e-3) * update)

    return peers.Runner(module, step, None)


def mean_shapes(param: Tensor) -> list[tuple[int, ...]]:
    """Return the shapes of the second moment's statistics: row and column means of a matrix, a vector as it is."""
    return [(param.shape[0], 1), (1, param.shape[1])] if param.ndim > 1 else [tuple(param.shape)]


def rms(x: Tensor) -> Tensor:
    """Return the root of the mean square."""
    return x.square().mean().sqrt()


def without_update(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return names and dtypes of the optimizers that were found to change no parameter."""
    return list(dict.fromkeys((row["name"], row["dtype"]) for row in rows if row["verdict"] == "no update"))


def relative_l2(values: Sequence[Tensor], reference: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    """Return `|values - reference| / |reference - start|`."""
    off = sum((a.double() - b.double()).square().sum() for a, b in zip(values, reference, strict=True))
    moved = sum((b.double() - s.double()).square().sum() for b, s in zip(reference, start, strict=True))
    return float((off / moved).sqrt())


def fraction_equal(values: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the fraction of elements that are equal."""
    equal = sum(int((a == b).sum()) for a, b in zip(values, others, strict=True))
    return equal / sum(a.numel() for a in values)


def compare_rounding() -> list[dict[str, Any]]:
    """Return for one bf16 step of gradient descent the share of elements that differ from `p - lr g` rounded once.

    `unchanged` is the share of elements that the step does not move.
    """
    dtype = torch.bfloat16
    module = module_of(SETS[0].shapes(), dtype)
    start = [p.detach() for p in module.parameters()]
    pairs = zip(start, gradients_of(module), strict=True)
    exact = [(p.double() - LOMO_LR * g.double()).float().to(dtype) for p, g in pairs]
    rows = []
    for name in (peers.OUR_LOMO, peers.LOMO_LOMO, peers.SGD_LOOP, peers.SGD_FUSED):
        values = after_steps(name, dtype, LOMO_LR, steps=1)
        misrounded = 1 - fraction_equal(values, exact)
        rows.append({"name": name, "misrounded": misrounded, "unchanged": fraction_equal(values, start)})
    rows.append({"name": "rounded once", "misrounded": 0.0, "unchanged": fraction_equal(exact, start)})
    return rows
