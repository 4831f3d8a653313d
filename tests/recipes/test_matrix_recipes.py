"""Muon, SOAP and SCALE beside other people's code, or a loop in float64 where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer as po
import torch
from torch import Tensor, nn

import optstate
from optstate import stores, testing, updates, weights
from optstate.recipes import SOAP, SUMO, Muon, Muon8bit, Scale
from optstate.testing.devices import CutParameter, gradient_of, noise

STEPS = 8
RECIPES: dict[str, Callable[..., optstate.Optimizer]] = {
    "muon": Muon,
    "muon8bit": Muon8bit,
    "soap": lambda params: SOAP(params, precondition_frequency=2),
    "scale": Scale,
    "sumo": lambda params: SUMO(params, rank=3, update_proj_gap=1),
}


def largest_difference(
    ours: Callable[..., optstate.Optimizer], theirs: Callable[..., Any], shape: tuple[int, ...], steps: int = STEPS
) -> float:
    """Step one parameter by both from the same gradients; return the largest difference after any step."""
    mine, other = (nn.Parameter(noise(shape, 1)) for _ in range(2))
    a, b = ours([("p", mine)]), theirs([other])
    worst = 0.0
    for step in range(1, steps + 1):
        mine.grad, other.grad = gradient_of(shape, step), gradient_of(shape, step)
        a.step()
        b.step()
        worst = max(worst, float((mine.detach() - other.detach()).abs().max()))
    return worst


# --- Muon -------------------------------------------------------------------------------------------------------------


def eager(optimizer: optstate.Optimizer) -> optstate.Optimizer:
    """Have the steps made by PyTorch's operations: compiled loops round once less in an average."""
    optimizer.use_backend("eager")
    return optimizer


@pytest.mark.peer
@pytest.mark.parametrize("shape", [(40, 24), (12, 40), (33, 33), (1, 5)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.0, "momentum": 0.8, "nesterov": False},
        {"ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"},
        {"adjust_lr_fn": "original"},
    ],
    ids=str,
)
def test_muon_is_that_of_torch_to_the_bit(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    found = largest_difference(
        lambda p: eager(Muon(p, lr=0.02, **options)), lambda p: torch.optim.Muon(p, lr=0.02, **options), shape
    )
    assert found == 0.0


def test_a_convolution_is_a_matrix_of_a_row_per_output() -> None:
    conv, matrix = nn.Parameter(noise((4, 3, 2, 2), 1)), nn.Parameter(noise((4, 3, 2, 2), 1).flatten(1))
    ours, theirs = eager(Muon([("c", conv)], lr=0.02)), torch.optim.Muon([matrix], lr=0.02)
    for step in range(1, 4):
        conv.grad = gradient_of((4, 3, 2, 2), step)
        matrix.grad = conv.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(conv.detach().flatten(1), matrix.detach(), rtol=0, atol=0)


def test_roles_and_shapes_choose_between_muon_and_adamw() -> None:
    shapes = {"hidden": (6, 4), "vector": (4,), "scalar": (), "embedding": (9, 4), "head": (9, 4), "norm": (1, 4)}
    params = {name: nn.Parameter(noise(shape, i)) for i, (name, shape) in enumerate(shapes.items())}
    groups: list[dict[str, Any]] = [{"params": [(name, params[name]) for name in ("hidden", "vector", "scalar")]}]
    groups += [{"params": [(name, params[name])], "role": name} for name in ("embedding", "head", "norm")]
    optimizer = Muon(groups, lr=0.02, weight_decay=0.1, adam_lr=1e-3)
    got = {plan.spec.name: sorted(plan.slots) for plan in optimizer.plan()}
    assert got == {name: ["exp_avg"] if name == "hidden" else ["exp_avg", "exp_avg_sq"] for name in shapes}
    others = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    adamw = torch.optim.AdamW(
        [p for name, p in others.items() if name != "hidden"], lr=1e-3, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1
    )
    for step in range(1, 6):
        for name, param in params.items():
            param.grad = gradient_of(param.shape, step)
            others[name].grad = gradient_of(param.shape, step)
        optimizer.step()
        adamw.step()
    for name in params.keys() - {"hidden"}:
        # A step of AdamW is at most lr, and lr * (adam_lr / lr) is adam_lr but for its last bit.
        torch.testing.assert_close(params[name].detach(), others[name].detach(), rtol=1e-6, atol=1e-6)


def test_a_schedule_moves_both_learning_rates() -> None:
    vector = nn.Parameter(torch.zeros(3))
    optimizer = Muon([("v", vector)], lr=0.02, adam_lr=1e-3)
    optimizer.param_groups[0]["lr"] = 0.01
    vector.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(vector.detach(), torch.full((3,), -5e-4), rtol=1e-5, atol=0)


def test_eight_bits_of_momentum_stay_near_fp32() -> None:
    """The error of Block8 is below 0.7 % of a block's largest element; orthogonalising keeps the order of it."""
    shape = (64, 96)
    ours, other = nn.Parameter(noise(shape, 1)), nn.Parameter(noise(shape, 1))
    a, b = Muon8bit([("p", ours)], lr=0.02), Muon([("p", other)], lr=0.02)
    assert a.state_nbytes() == 64 * 96 + 4 * 64 * 96 // 256
    for step in range(1, 6):
        ours.grad, other.grad = gradient_of(shape, step), gradient_of(shape, step)
        a.step()
        b.step()
    moved = other.detach() - noise(shape, 1)
    assert (ours.detach() - other.detach()).norm() < 0.05 * moved.norm()
    assert (ours.detach() - other.detach()).norm() > 0


# --- SOAP -------------------------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("shape", [(24, 24), (16, 24), (12, 40), (7,), (), (4, 3, 5, 2)], ids=str)
@pytest.mark.parametrize(
    ("every", "largest"), [(3, 10000), (100, 10000), (2, 20)], ids=["turned", "first basis", "one side"]
)
def test_soap_is_that_of_pytorch_optimizer(shape: tuple[int, ...], every: int, largest: int) -> None:
    """In one process both get the same eigenvectors; 4e-6 is 1e-4 of the movement, by the rounding of fp32 products."""
    found = largest_difference(
        lambda p: SOAP(p, precondition_frequency=every, max_precond_dim=largest, weight_decay=0.1),
        lambda p: po.SOAP(p, precondition_frequency=every, max_precondition_dim=largest, weight_decay=0.1),
        shape,
    )
    assert found < 4e-6


class Float64Soap:
    """SOAP of one matrix in float64, from the paper's algorithm 3, with moments in the turned basis."""

    def __init__(self, weight: Tensor, lr: float, b1: float, b2: float, eps: float, decay: float, every: int) -> None:
        self.w, self.numbers, self.t = weight.double().clone(), (lr, b1, b2, eps, decay, every), 0
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.left, self.right = (torch.zeros(n, n, dtype=torch.float64) for n in weight.shape)

    def step(self, g: Tensor) -> None:
        lr, b1, b2, eps, decay, every = self.numbers
        self.t, g = self.t + 1, g.double()
        if self.t > 1:
            z = self.ql.T @ g @ self.qr
            self.m, self.v = b1 * self.m + (1 - b1) * z, b2 * self.v + (1 - b2) * z * z
            scale = (1 - b2 ** (self.t - 1)) ** 0.5 / (1 - b1 ** (self.t - 1))
            self.w = self.w - lr * scale * self.ql @ (self.m / (self.v.sqrt() + eps)) @ self.qr.T
            self.w = self.w * (1 - lr * decay)
        self.left, self.right = b2 * self.left + (1 - b2) * g @ g.T, b2 * self.right + (1 - b2) * g.T @ g
        if self.t == 1:
            self.ql, self.qr = (torch.linalg.eigh(a)[1].flip(1) for a in (self.left, self.right))
        elif (self.t - 1) % every == 0:
            whole = self.ql @ self.m @ self.qr.T
            for side, gram in enumerate((self.left, self.right)):
                basis = self.qr if side else self.ql
                order = (basis.T @ gram @ basis).diagonal().argsort(descending=True)
                self.v = self.v.index_select(side, order)
                new = torch.linalg.qr(gram @ basis[:, order])[0]
                self.ql, self.qr = (self.ql, new) if side else (new, self.qr)
            self.m = self.ql.T @ whole @ self.qr


def test_soap_follows_the_equations() -> None:
    """fp64 on both sides, on Gram matrices of full rank; an eigenvector's sign cancels. 1e-9 of weights near one."""
    shape = (16, 16)
    param = nn.Parameter(noise(shape, 1).double())
    ours = SOAP([("p", param)], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, precondition_frequency=3)
    theirs = Float64Soap(param.detach(), 3e-3, 0.9, 0.95, 1e-8, 0.1, 3)
    for step in range(1, 12):
        grad = gradient_of(shape, step).double() + 3 * torch.eye(16)
        param.grad = grad.clone()
        ours.step()
        theirs.step(grad)
        torch.testing.assert_close(param.detach(), theirs.w, rtol=0, atol=1e-9)


def test_the_first_step_of_soap_changes_no_weight() -> None:
    params = [nn.Parameter(noise(shape, 1)) for shape in ((6, 4), (5,))]
    before = [param.detach().clone() for param in params]
    optimizer = SOAP(params, weight_decay=0.5)
    for param in params:
        param.grad = gradient_of(param.shape, 1)
    optimizer.step()
    assert all(torch.equal(param.detach(), was) for param, was in zip(params, before, strict=True))


@pytest.mark.parametrize("kind", ["zero", "rank one"])
def test_soap_takes_gradients_of_low_rank(kind: str) -> None:
    """An eigenvector of the value zero is arbitrary, and what is turned by it is zero but for rounding."""
    param = nn.Parameter(noise((12, 8), 1))
    optimizer = SOAP([("p", param)], precondition_frequency=2, eps=1e-3)
    for _ in range(5):
        param.grad = torch.outer(noise((12,), 2), noise((8,), 3)) * (kind != "zero")
        optimizer.step()
    moved = param.detach() - noise((12, 8), 1)
    assert moved.isfinite().all()
    assert (moved.abs().max() > 1e-3) == (kind != "zero")


@pytest.mark.parametrize("parts", [(2, 1), (4, 1), (1, 3), (2, 2)], ids=str)
@pytest.mark.parametrize("second", [stores.Full(), stores.Factored(), stores.Block8()], ids=str)
def test_soap_in_parts_turns_whatever_its_moments_are_kept_in(second: stores.Store, parts: tuple[int, ...]) -> None:
    """fp64, where parts and whole differ by the order of sums alone: codes are the same."""
    recipe = lambda p: SOAP(p, lr=1e-2, precondition_frequency=2, second=second)  # noqa: E731
    cut = CutParameter(recipe, (64, 96), parts, torch.float64)
    cut.train(5)
    param, _ = cut.joined()
    torch.testing.assert_close(param, cut.whole.detach(), rtol=0, atol=1e-8)


# --- SCALE ------------------------------------------------------------------------------------------------------------


def test_scale_follows_the_official_rule() -> None:
    """In float64: rows by their root mean square, columns of embeddings, momentum in the head, AdamW on vectors."""
    lr, decay, beta, (b1, b2), adam_lr = 1e-2, 0.1, 0.9, (0.9, 0.999), 2e-3
    shapes = {"matrix": (6, 4), "conv": (3, 2, 2, 2), "embedding": (9, 4), "head": (9, 4), "vector": (5,)}
    params = {name: nn.Parameter(noise(shape, i).double()) for i, (name, shape) in enumerate(shapes.items())}
    ours = Scale(
        [
            {"params": [(name, params[name])], **({"role": name} if name in ("embedding", "head") else {})}
            for name in params
        ],
        lr=lr,
        weight_decay=decay,
        adam_lr=adam_lr,
    )
    wanted = {name: param.detach().clone() for name, param in params.items()}
    buffer, m, v = torch.zeros(9, 4).double(), torch.zeros(5).double(), torch.zeros(5).double()
    for t in range(1, 7):
        grads = {name: gradient_of(shape, t).double() for name, shape in shapes.items()}
        for name, param in params.items():
            param.grad = grads[name].clone()
        ours.step()
        buffer = beta * buffer + (1 - beta) * grads["head"]
        directions = {"matrix": grads["matrix"], "embedding": grads["embedding"], "head": buffer}
        for name, g in directions.items():
            rms = g.square().mean(0 if name == "embedding" else 1, keepdim=True).sqrt()
            wanted[name] = wanted[name] * (1 - lr * decay) - lr * g / rms
        m, v = b1 * m + (1 - b1) * grads["vector"], b2 * v + (1 - b2) * grads["vector"] ** 2
        step = m / (v.sqrt() + 1e-8) * (1 - b2**t) ** 0.5 / (1 - b1**t)
        wanted["vector"] = wanted["vector"] * (1 - adam_lr * decay) - adam_lr * step
    for name in wanted.keys() - {"conv"}:
        torch.testing.assert_close(params[name].detach(), wanted[name], rtol=0, atol=1e-12)
    assert ours.state_nbytes() == 8 * (9 * 4 + 2 * 5)


# --- SUMO -------------------------------------------------------------------------------------------------------------


class Float64Sumo:
    """SUMO of one matrix in float64, from the paper's algorithm 1."""

    def __init__(self, rank: int, every: int, lr: float, mu: float, decay: float) -> None:
        self.numbers, self.t = (rank, every, lr, mu, decay), 0

    def step(self, w: Tensor, g: Tensor) -> Tensor:
        rank, every, lr, mu, decay = self.numbers
        if g.shape[0] < g.shape[1]:
            return self.step(w.T, g.T).T
        if self.t % every == 0:
            q = torch.linalg.svd(g, full_matrices=False)[0][:, :rank]
            self.m = q.T @ self.q @ self.m if self.t else torch.zeros(q.shape[1], g.shape[1]).double()
            self.q = q
        self.t, low = self.t + 1, self.q.T @ g
        self.m = mu * self.m + low
        u, s, vh = torch.linalg.svd(self.m, full_matrices=False)
        o = u @ (s > 1e-6 * s.max()).double().diag() @ vh
        return w * (1 - lr * decay) - lr * (g - self.q @ (low - o))


@pytest.mark.parametrize("shape", [(20, 12), (12, 30), (9, 9)], ids=str)
@pytest.mark.parametrize("rank", [3, 50])
def test_sumo_follows_the_equations(shape: tuple[int, int], rank: int) -> None:
    """fp64 on both sides: 1e-8, as the inverse roots of a Gram matrix lose half of the digits."""
    param = nn.Parameter(noise(shape, 1).double())
    optimizer = SUMO(
        [("p", param)], lr=1e-2, momentum=0.9, weight_decay=0.1, rank=rank, update_proj_gap=3, projection="svd"
    )
    theirs, wanted = Float64Sumo(rank, 3, 1e-2, 0.9, 0.1), param.detach().clone()
    for step in range(1, 9):
        param.grad = gradient_of(shape, step).double()
        wanted = theirs.step(wanted, param.grad)
        optimizer.step()
        torch.testing.assert_close(param.detach(), wanted, rtol=0, atol=1e-8)
    assert optimizer.state_nbytes() == 8 * min(rank, *shape) * sum(shape)


@pytest.mark.parametrize("projection", ["randomized", "svd"])
@pytest.mark.parametrize("parts", [(2, 1), (4, 1), (1, 3), (2, 2)], ids=str)
@pytest.mark.parametrize("shape", [(40, 24), (12, 40)], ids=str)
def test_sumo_in_parts_is_that_of_the_whole(shape: tuple[int, int], parts: tuple[int, ...], projection: Any) -> None:
    """fp64: parts differ from the whole by the order of sums."""
    recipe = lambda p: SUMO(p, lr=1e-2, rank=4, update_proj_gap=2, projection=projection)  # noqa: E731
    cut = CutParameter(recipe, shape, parts, torch.float64)
    cut.train(5)
    torch.testing.assert_close(cut.joined()[0], cut.whole.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["zero", "rank one"])
def test_sumo_takes_gradients_of_low_rank(kind: str) -> None:
    param = nn.Parameter(noise((12, 8), 1))
    optimizer = SUMO([("p", param)], lr=1e-2, rank=4, update_proj_gap=2)
    direction = torch.outer(noise((12,), 2), noise((8,), 3)) * (kind != "zero")
    for _ in range(5):
        param.grad = direction.clone()
        optimizer.step()
    moved = param.detach() - noise((12, 8), 1)
    wanted = -5e-2 * direction / direction.norm().clamp(min=1e-9)  # one singular vector of the value one
    torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-5)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_laws_of_recipes_hold(name: str) -> None:
    """Two of the laws; `tests/testing/test_own_parts.py` asks for all of them, with the defaults."""
    testing.check_recipe(RECIPES[name], laws=["fused is stepped", "bad gradients"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soap", "sumo"])
def test_all_laws_hold_where_bases_are_made_anew_in_between(name: str) -> None:
    testing.check_recipe(RECIPES[name])


@pytest.mark.parametrize("name", RECIPES)
def test_a_state_dict_resumes_exactly(name: str) -> None:
    def made() -> tuple[dict[str, nn.Parameter], optstate.Optimizer]:
        params = {str(shape): nn.Parameter(noise(shape, 1).bfloat16()) for shape in ((64, 96), (7,))}
        return params, RECIPES[name](list(params.items()))

    def step(params: dict[str, nn.Parameter], optimizer: optstate.Optimizer, steps: range) -> None:
        for t in steps:
            for param in params.values():
                param.grad = gradient_of(param.shape, t).bfloat16()
            optimizer.step()

    (params, optimizer), (again, other) = made(), made()
    step(params, optimizer, range(1, 4))
    other.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for key, param in again.items():
            param.copy_(params[key])
    step(params, optimizer, range(4, 7))
    step(again, other, range(4, 7))
    assert all(torch.equal(again[key], param) for key, param in params.items())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda p: Muon(p, ns_steps=0), "steps=0: give a whole number"),
        (lambda p: Muon(p, momentum=1.0), "momentum=1.0 is out of range"),
        (lambda p: Muon(p, adjust_lr_fn="big"), "shape_scale='big'"),
        (lambda p: Muon(p, lr=0.0), "give an lr above 0"),
        (lambda p: Muon(p, adam_lr=-1.0), "give a finite number"),
        (lambda p: Muon8bit(p, block=3), "a block is an even number"),
        (lambda p: SOAP(p, precondition_frequency=0), "every=0: give a whole number"),
        (lambda p: SOAP(p, max_precond_dim=1.5), "largest=1.5: give a whole number"),
        (lambda p: SOAP(p, shampoo_beta=1.0), "shampoo_beta=1.0 is out of range"),
        (lambda p: SOAP(p, betas=(0.9, 1.0)), "out of range"),
        (lambda p: Scale(p, momentum=-0.1), "momentum=-0.1 is out of range"),
        (lambda p: SUMO(p, rank=0), "rank=0: give a whole number"),
        (lambda p: SUMO(p, update_proj_gap=-1), "gap=-1: give a whole number"),
        (lambda p: SUMO(p, projection="random"), "keeps no vectors to carry"),
        (lambda p: updates.project_and_carry(updates.scale_by_adam()), "'exp_avg_sq' cannot be carried"),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_a_line(build: Callable[..., Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        build([("p", nn.Parameter(torch.zeros(4, 4)))])
    assert "\n" not in str(raised.value)


def test_the_plan_tells_the_bytes_before_anything_is_allocated() -> None:
    param = nn.Parameter(torch.empty(4096, 11008, device="meta", dtype=torch.bfloat16))
    size = 4096 * 11008
    assert Muon([("p", param)]).plan().nbytes == 4 * size
    assert Muon8bit([("p", param)]).plan().nbytes == size + 4 * size // 256
    assert SOAP([("p", param)]).plan().nbytes == 8 * size + 4 * 2 * 4096**2  # 11008 columns are not turned
    assert Scale([("p", param)]).plan().nbytes == 0


def test_a_flag_fuses_the_backward_pass() -> None:
    param = nn.Parameter(noise((6, 4), 1))
    optimizer = Muon([("p", param)], fused_backward=True, weights=weights.Plain())
    param.square().sum().backward()
    assert optimizer.fused.active
    assert param.grad is None
    optimizer.step()
    optimizer.fused.remove()


def test_normalized_rows_and_columns_have_a_root_mean_square_of_one() -> None:
    for transform, dim in ((updates.normalize_rows(rms=True), 1), (updates.normalize_columns(rms=True), 0)):
        param = nn.Parameter(torch.zeros(6, 4))
        optimizer = optstate.Optimizer([("p", param)], transform, lr=1.0)
        param.grad = gradient_of((6, 4), 2)
        optimizer.step()
        torch.testing.assert_close(param.detach().square().mean(dim).sqrt(), torch.ones(param.shape[1 - dim]))
