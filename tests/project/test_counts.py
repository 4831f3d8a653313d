"""The counts of launches and bytes: the counter on cases counted by hand, and what a step of a few recipes costs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optstate import kernels
from optstate.kernels.native import loading
from optstate.optimizer.small_steps import ROUND_ELEMENTS
from optstate.recipes import registry
from optstate.weights import Plain, StochasticRounding, Weights
from tests.support.compiled import needs_compiled_steps
from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import byte_floor
    import counts
    import dispatch
    from dispatch import Cost
finally:
    del sys.path[0]

PLAIN, STOCHASTIC = Plain(), StochasticRounding()
FP32, BF16 = torch.float32, torch.bfloat16
ROWS, COLS = 4096, 4096
MATRIX = ROWS * COLS  # four chunks of an accelerator


def cost_of(run: Callable[[], Any], **options: Any) -> Cost:
    with dispatch.DispatchCounter(**options) as counter:
        run()
    return counter.cost


def recipe_cost(
    recipe: str, dtype: torch.dtype, weights: Weights, shapes: dict[str, tuple[int, ...]]
) -> tuple[Cost, int]:
    return counts.count_recipe(recipe, shapes, dtype, weights)


# --- the counter ------------------------------------------------------------------------------------------------------


X, Y, ROW = torch.zeros(100, 30), torch.zeros(100, 30), torch.zeros(1, 30)
HALF, CODES, TABLE = torch.zeros(100, 30, dtype=BF16), torch.zeros(3000, dtype=torch.int32), torch.zeros(256)
SHORT, LONG = torch.zeros(5, dtype=torch.int64), torch.zeros(10**5)
N = 4 * 3000


@pytest.mark.parametrize(
    ("run", "launches", "nbytes"),
    [
        pytest.param(lambda: X.add_(Y, alpha=0.1), 1, 3 * N, id="in place: two read, one written"),
        pytest.param(lambda: X + Y, 1, 3 * N, id="a new tensor"),
        pytest.param(lambda: torch.mul(X, X, out=Y), 1, 2 * N, id="one operand twice, read once"),
        pytest.param(lambda: torch.mul(X, ROW, out=X), 1, 2 * N + 120, id="a row for all rows"),
        pytest.param(lambda: X.mul_(ROW.expand(100, 30)), 1, 2 * N + 120, id="an expanded row is a row"),
        pytest.param(lambda: X.copy_(HALF), 1, N + N // 2, id="a copy does not read its target"),
        pytest.param(lambda: X.zero_(), 1, N, id="written only"),
        pytest.param(lambda: torch.zeros_like(X), 1, N, id="values of the pattern are not read"),
        pytest.param(lambda: X.sum(), 1, N + 4, id="a sum"),
        pytest.param(lambda: X[10:20].add_(1.0), 1, 2 * N // 10, id="of a view its elements"),
        pytest.param(lambda: TABLE.index_select(0, CODES), 1, 3 * 1024 - 2048 + 2 * N, id="a table is read once"),
        pytest.param(lambda: LONG.index_select(0, SHORT), 1, 20 + 40 + 20, id="of a long one what is taken"),
        pytest.param(lambda: X.view(-1)[3:].t().detach(), 0, 0, id="views"),
        pytest.param(lambda: X.new_empty(7) is torch.empty(3), 0, 0, id="allocations"),
        pytest.param(lambda: torch._foreach_add_([X, Y], [Y, X]), 1, 4 * N, id="lists: both are read, both written"),
    ],
)
def test_one_operator(run: Callable[[], Any], launches: int, nbytes: int) -> None:
    assert cost_of(run) == Cost(launches, nbytes)


def test_a_value_makes_the_host_wait_unless_it_is_there() -> None:
    step = torch.tensor(3.0)
    assert cost_of(lambda: X.sum().item()) == Cost(1, N + 4, 1)
    assert cost_of(lambda: (step + 1).item(), on_host=[step]) == Cost()
    assert cost_of(lambda: X.mul_(step), on_host=[step]) == Cost(1, 2 * N + 4)


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([1] * 31, 5, 2),
        ([0] * 40 + [1] * 30, 5, 1),
        ([65536 * 320], 4, 1),
        ([65536 * 320 + 1], 4, 2),
        ([65536 * 319, 65536 + 1, 5], 4, 2),
        ([], 1, 0),
    ],
)
def test_launches_of_lists(sizes: list[int], lists: int, launches: int) -> None:
    assert dispatch.multi_tensor_launches(sizes, lists) == launches


def test_adamw_of_torch() -> None:
    """Fused, four tensors are read and three written, besides step counters. Else it is mul, lerp, mul, addcmul, sqrt,
    div, add and addcdiv, which touch 2, 3, 2, 3, 2, 2, 2 and 4 tensors.
    """
    passes, counters = {True: 7, False: 20}, 4 + 8  # read by the fused kernel; raised by one before
    for fused in (True, False):
        param = nn.Parameter(torch.zeros(1000))
        optimizer = torch.optim.AdamW([param], fused=fused, foreach=False)
        param.grad = torch.zeros(1000)
        optimizer.step()
        cost = cost_of(optimizer.step, on_host=[] if fused else [optimizer.state[param]["step"]])
        assert cost == Cost(2 if fused else 8, passes[fused] * 4000 + (counters if fused else 0))


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_costs_what_its_parameters_cost_together() -> None:
    shapes = {"a": (300, 20), "b": (300, 20), "c": (7,), "d": (20, 300)}
    for recipe in ("adalomo", "adamw8bit", "came"):
        with FakeTensorMode(allow_non_fake_inputs=True), kernels.rehearsal("cuda", every_round=True):
            params = {name: nn.Parameter(torch.empty(shape, dtype=BF16)) for name, shape in shapes.items()}
            optimizer = registry.get(recipe)(params.items(), lr=1e-3, weights=STOCHASTIC)
            for _ in range(2):
                for param in params.values():
                    param.grad = torch.empty_like(param)
                together = cost_of(optimizer.step)
        assert recipe_cost(recipe, BF16, STOCHASTIC, shapes)[0] == together


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["adalomo", "lomo", "lion8bit"])
def test_no_round_is_left_out(recipe: str) -> None:
    """A whole chunk costs what the next one costs: 1,024 rows, or 512 where random bits need room."""
    two, three, four = (recipe_cost(recipe, BF16, STOCHASTIC, {"w": (rows, COLS)})[0] for rows in (2048, 3072, 4096))
    assert three.launches - two.launches == four.launches - three.launches > 20
    assert three.bytes - two.bytes == four.bytes - three.bytes > 6 * 1024 * COLS


def test_a_whole_step_says_what_it_costs() -> None:
    """AdamW with 8-bit moments: the gradient twice, and everything else once each way, in two passes."""
    count = ROWS * COLS
    found, _ = counts.count_recipe("adamw8bit", {"w": (ROWS, COLS)}, BF16, STOCHASTIC, "native")
    assert found == Cost(2, 2 * 2 * count + 2 * 2 * count + 2 * 2 * (count + 4 * count // 256))


@needs_compiled_steps
@pytest.mark.parametrize("recipe", ["adalomo", "adamw8bit", "lion", "came"])
@pytest.mark.parametrize("count", [2, 50, 700])
def test_small_parameters_share_calls(recipe: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls for every 524,288 elements: one looks at the gradients, one writes."""
    params = [nn.Parameter(torch.ones(32, 40)) for _ in range(count)]
    optimizer = registry.get(recipe)([(f"p{i}", param) for i, param in enumerate(params)], lr=1e-3)
    calls: list[str] = []
    functions, _ = loading.opened()

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return functions[name](*arguments)

        return call

    for step in range(2):
        calls.clear()
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        if not step:
            monkeypatch.setattr(loading, "opened", lambda: ({name: counted(name) for name in functions}, ""))
    rounds = -(-count // (ROUND_ELEMENTS // (32 * 40)))
    looked, written = calls.count("begin_many"), calls.count("finish_many")
    by_torch = recipe == "adamw8bit"  # whose parameters of 1,280 elements are PyTorch's fused AdamW
    assert (looked, written, len(calls)) == (rounds, 0 if by_torch else rounds, rounds * (1 if by_torch else 2))


HELD = [
    ("adalomo", FP32, PLAIN, 160, 1_678_961_167),
    ("adalomo", BF16, PLAIN, 185, 2_148_724_871),
    ("adalomo", BF16, STOCHASTIC, 392, 3_826_518_423),
    ("lomo", BF16, STOCHASTIC, 245, 2_483_037_610),
    ("adamw", FP32, PLAIN, 16, 536_873_040),
    ("adamw", BF16, STOCHASTIC, 458, 4_932_521_048),
    ("adamw8bit", FP32, PLAIN, 1036, 5_912_988_989),
    ("adamw8bit", BF16, STOCHASTIC, 1450, 7_959_826_152),
    ("came", BF16, STOCHASTIC, 469, 5_840_882_894),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "dtype", "weights", "launches", "nbytes"), HELD)
def test_nobody_adds_a_pass_unseen(
    recipe: str, dtype: torch.dtype, weights: Weights, launches: int, nbytes: int
) -> None:
    """A change that needs fewer is welcome: lower the figure. One that needs more has to say what for."""
    found, _ = recipe_cost(recipe, dtype, weights, {"matrix": (ROWS, COLS), "vector": (64,)})
    assert found == Cost(launches, nbytes, waits=0)


# --- floors -----------------------------------------------------------------------------------------------------------

SUMS = 4 * (ROWS + COLS)


@pytest.mark.parametrize(
    ("recipe", "options", "dtype", "floor"),
    [
        ("lomo", {}, FP32, 12 * MATRIX),
        ("lomo", {}, BF16, 6 * MATRIX),
        ("adamw", {}, BF16, 22 * MATRIX),
        ("adamw8bit", {}, FP32, 12 * MATRIX + 4 * (MATRIX + MATRIX // 256 * 4)),
        ("lion8bit", {}, BF16, 6 * MATRIX + 2 * (MATRIX + MATRIX // 256 * 4)),
        ("adalomo", {}, FP32, 24 * MATRIX + 2 * SUMS),
        ("adalomo", {"clip_threshold": None}, FP32, 20 * MATRIX + 2 * SUMS),
        ("adafactor", {}, BF16, 12 * MATRIX + 2 * SUMS),
        ("adammini", {}, FP32, 20 * MATRIX + 2 * 4 * ROWS),
        ("adamfactor", {}, BF16, 8 * MATRIX + 2 * (MATRIX + MATRIX // 256 * 4) + 2 * SUMS),
        ("came", {}, FP32, 32 * MATRIX + 4 * SUMS),
        ("sm3", {}, FP32, 12 * MATRIX + 2 * SUMS),
    ],
)
def test_floors(recipe: str, options: dict[str, Any], dtype: torch.dtype, floor: int) -> None:
    """Parameter read and written, gradient read once and once more for each sum, state read and written."""
    param: Tensor = nn.Parameter(torch.empty(ROWS, COLS, dtype=dtype, device="meta"))
    optimizer = registry.get(recipe)([("w", param)], lr=1e-3, **options)
    (plan,) = optimizer.plan()
    assert byte_floor.byte_floor(plan, optimizer.param_groups[0]) == floor


@pytest.mark.slow
@pytest.mark.parametrize("recipe", registry.names())
def test_nothing_moves_less_than_its_floor(recipe: str) -> None:
    for dtype, weights in ((FP32, PLAIN), (BF16, PLAIN), (BF16, STOCHASTIC)):
        cost, floor = recipe_cost(recipe, dtype, weights, {"matrix": (1024, 512), "vector": (64,)})
        assert cost.bytes >= floor
