"""Every transform against its formula, written here in NumPy from the paper's definition, over several steps.

Parameters, gradients and statistics are fp64. Each test drives `optstate.Optimizer` and compares after every step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import optstate
from optstate import updates
from optstate.stores import Factored, Full
from optstate.updates import Transform

chunking = importlib.import_module("optstate.kernels.chunking")  # `kernels.chunks` itself is the function

Array = Any
Rule = Callable[[Array, Array, int, dict[str, Any]], Array]
"""`(parameter, gradient, step counted from 1, memory) -> the parameter after the step`."""

SHAPES = [(), (5,), (4, 3), (2, 4, 3), (2, 3, 4, 2)]
MATRICES = [shape for shape in SHAPES if len(shape) >= 2]
LR = 0.05
STEPS = 6

TOLERANCE = {"rtol": 1e-12, "atol": 1e-13}
"""Parameters and steps are about 1; six steps of some ten operations, each off by 1e-16."""

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_matrix = pytest.mark.parametrize("shape", MATRICES, ids=str)


def gradients(shape: tuple[int, ...], seed: int = 0) -> list[Array]:
    """Gradients of very different sizes, so that each clip acts at some steps and not at others."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) * size for size in (0.1, 3.0, 0.5, 10.0, 0.02, 1.0)[:STEPS]]


def start(shape: tuple[int, ...], size: float = 1.0) -> Array:
    return np.random.default_rng(99).standard_normal(shape) * size


def run(
    chain: Transform,
    shape: tuple[int, ...],
    *,
    lr: Any = LR,
    size: float = 1.0,
    change: dict[str, Any] | None = None,
    grads: list[Array] | None = None,
) -> list[Array]:
    """The parameter after each step; `change` is written into the param group before the fourth."""
    param = torch.nn.Parameter(torch.tensor(start(shape, size), dtype=torch.float64))
    opt = optstate.Optimizer([("p", param)], chain, lr=lr)
    history = []
    for step, grad in enumerate(grads or gradients(shape), 1):
        if step == 4 and change:
            assert set(change) <= set(opt.param_groups[0])
            opt.param_groups[0].update(change)
        param.grad = torch.tensor(grad, dtype=torch.float64)
        opt.step()
        assert opt.state[param]["step"] == step
        history.append(param.detach().numpy().copy())
    return history


def follow(rule: Rule, shape: tuple[int, ...], size: float = 1.0) -> list[Array]:
    p, memory, history = start(shape, size), {}, []
    for step, grad in enumerate(gradients(shape), 1):
        p = rule(p, grad, step, memory)
        history.append(p)
    return history


def agree(chain: Transform, rule: Rule, shape: tuple[int, ...], **options: Any) -> None:
    """The same numbers after every step, in one piece and in pieces of five elements."""
    want = follow(rule, shape, options.get("size", 1.0))
    for limit in (1 << 18, 5):
        with mock.patch.object(chunking, "CPU_CHUNK", limit):
            got = run(chain, shape, **options)
        for step, (a, b) in enumerate(zip(got, want, strict=True), 1):
            np.testing.assert_allclose(a, b, **TOLERANCE, err_msg=f"step {step}, chunks of {limit}")


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def norm(x: Array) -> float:
    return float(np.sqrt(np.sum(np.square(x))))


def ema(memory: dict[str, Any], name: str, value: Array, weight: float) -> Array:
    memory[name] = (1 - weight) * memory.get(name, 0.0) + weight * value
    return memory[name]


def second_moment(g: Array, m: dict[str, Any], weight: float = 0.5, eps: float = 1e-3) -> Array:
    return ema(m, "v", g * g + eps, weight)


def factored_second_moment(g: Array, memory: dict[str, Any], weight: float, eps: float) -> Array:
    """Adafactor, algorithm 4 without its clip: R and C as means instead of sums, V = R C / mean(R)."""
    square = g * g + eps
    row = ema(memory, "row", square.mean(-1, keepdims=True), weight)
    col = ema(memory, "col", square.mean(-2, keepdims=True), weight)
    return row * col / row.mean(-2, keepdims=True)


# --- no transform, clips, scales -----------------------------------------------------------------------------------


@every_shape
def test_an_empty_chain_is_gradient_descent(shape):
    agree(optstate.chain(), lambda p, g, t, m: p - LR * g, shape)


@every_shape
def test_clip_by_rms_divides_by_what_the_rms_exceeds_the_threshold_by(shape):
    factors = [max(1.0, rms(g) / 0.7) for g in gradients(shape)]
    assert 1.0 in factors
    assert max(factors) > 1
    agree(updates.clip_by_rms(0.7), lambda p, g, t, m: p - LR * g / max(1.0, rms(g) / 0.7), shape)


@every_shape
def test_clip_by_norm_is_torch_clip_grad_norm_per_parameter(shape):
    def rule(p, g, t, m):
        grad = torch.tensor(g)
        leaf = torch.nn.Parameter(torch.zeros_like(grad))
        leaf.grad = grad
        torch.nn.utils.clip_grad_norm_([leaf], 0.9)
        return p - LR * leaf.grad.numpy()

    agree(updates.clip_by_norm(0.9), rule, shape)
    agree(updates.clip_by_norm(0.9), lambda p, g, t, m: p - LR * g * min(1, 0.9 / (norm(g) + 1e-6)), shape)


@every_shape
def test_clip_by_value_at_the_head_clamps_the_gradient(shape):
    agree(updates.clip_by_value(0.4), lambda p, g, t, m: p - LR * np.clip(g, -0.4, 0.4), shape)


@every_shape
def test_two_clips_by_value_at_the_head_are_the_narrower_one(shape):
    first, second = updates.clip_by_value(updates.hyper("wide", 0.9)), updates.clip_by_value(0.4)
    for chain in (optstate.chain(first, second), optstate.chain(second, first)):
        agree(chain, lambda p, g, t, m: p - LR * np.clip(g, -0.4, 0.4), shape)


@every_shape
def test_clip_by_value_after_another_transform_clamps_its_update(shape):
    double = updates.scale_by_schedule(lambda step, lr: 2.0)
    chain = optstate.chain(double, updates.clip_by_value(0.4))
    agree(chain, lambda p, g, t, m: p - LR * np.clip(2 * g, -0.4, 0.4), shape)


@every_shape
def test_clip_by_value_after_a_moment_clamps_the_moment(shape):
    chain = optstate.chain(updates.momentum(beta=0.9), updates.clip_by_value(0.2))
    agree(chain, lambda p, g, t, m: p - LR * np.clip(ema(m, "m", g, 0.1), -0.2, 0.2), shape)


@every_shape
@pytest.mark.parametrize("between", [False, True], ids=["at once", "with a step between"])
def test_clip_by_value_after_weight_decay_clamps_both(shape, between):
    steps = [updates.scale_by_schedule(lambda step, lr: 2.0)] if between else []
    chain = optstate.chain(updates.add_decayed_weights(0.3), *steps, updates.clip_by_value(0.4))
    scale = 2 if between else 1
    agree(chain, lambda p, g, t, m: p - LR * np.clip(scale * (g + 0.3 * p), -0.4, 0.4), shape)


@every_shape
def test_clip_by_rms_after_weight_decay_clips_both(shape):
    def rule(p, g, t, m):
        u = g + 0.3 * p
        return p - LR * u / max(1.0, rms(u) / 0.5)

    agree(optstate.chain(updates.add_decayed_weights(0.3), updates.clip_by_rms(0.5)), rule, shape)


@pytest.mark.parametrize("clip", [updates.clip_by_rms, updates.clip_by_norm, updates.clip_by_value])
def test_a_clip_at_none_does_nothing(clip):
    agree(clip(None), lambda p, g, t, m: p - LR * g, (4, 3))


@every_shape
@pytest.mark.parametrize("size", [2.0, 1e-6], ids=["large", "below eps"])
def test_scale_by_param_rms_multiplies_by_the_rms_before_the_step_at_least_eps(shape, size):
    chain = updates.scale_by_param_rms(1e-3)
    agree(chain, lambda p, g, t, m: p - LR * max(1e-3, rms(p)) * g, shape, size=size)


@every_shape
def test_weight_decay_before_the_parameter_scale_is_scaled_with_it(shape):
    chain = optstate.chain(updates.add_decayed_weights(0.3), updates.scale_by_param_rms(1e-3))
    agree(chain, lambda p, g, t, m: p - LR * max(1e-3, rms(p)) * (g + 0.3 * p), shape)


@every_shape
def test_weight_decay_after_the_parameter_scale_is_not(shape):
    chain = optstate.chain(updates.scale_by_param_rms(1e-3), updates.add_decayed_weights(0.3))
    agree(chain, lambda p, g, t, m: p - LR * (max(1e-3, rms(p)) * g + 0.3 * p), shape)


@every_shape
def test_weight_decays_add_up(shape):
    other = updates.add_decayed_weights(updates.hyper("more_decay", 0.2))
    chain = optstate.chain(updates.add_decayed_weights(0.3), other)
    agree(chain, lambda p, g, t, m: p - LR * (g + 0.5 * p), shape)


@every_shape
def test_a_schedule_sees_the_step_from_one_and_the_learning_rate(shape):
    chain = optstate.chain(
        updates.add_decayed_weights(0.3), updates.scale_by_schedule(lambda step, lr: lr / step + 0.5)
    )
    agree(chain, lambda p, g, t, m: p - LR * (LR / t + 0.5) * (g + 0.3 * p), shape)


@every_shape
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25, dtype=torch.float64)], ids=["float", "tensor"])
def test_a_global_coefficient_multiplies_after_the_clip_by_value_and_before_everything_else(shape, scale):
    chain = optstate.chain(updates.clip_by_value(0.4), updates.clip_by_rms(0.08), updates.add_decayed_weights(0.3))
    param = torch.nn.Parameter(torch.tensor(start(shape)))
    opt = optstate.Optimizer([("p", param)], chain, lr=LR)
    p = start(shape)
    for grad in gradients(shape):
        param.grad = torch.tensor(grad)
        opt.step_parameter(param, scale)
        u = 0.25 * np.clip(grad, -0.4, 0.4)
        p = p - LR * (u / max(1.0, rms(u) / 0.08) + 0.3 * p)
        np.testing.assert_allclose(param.detach().numpy(), p, **TOLERANCE)


# --- the learning rate ---------------------------------------------------------------------------------------------


@every_shape
def test_a_learning_rate_may_be_a_tensor(shape):
    chain = optstate.chain(updates.clip_by_rms(0.7), updates.add_decayed_weights(0.3))
    lr = torch.tensor(LR, dtype=torch.float64)
    agree(chain, lambda p, g, t, m: p - LR * (g / max(1.0, rms(g) / 0.7) + 0.3 * p), shape, lr=lr)


@pytest.mark.parametrize("lr", [1, 0], ids=["one", "zero"])
def test_a_learning_rate_may_be_a_whole_number(lr):
    agree(updates.add_decayed_weights(0.3), lambda p, g, t, m: p - lr * (g + 0.3 * p), (4, 3), lr=lr)


@every_shape
def test_the_learning_rate_is_read_at_every_step(shape):
    lr_of = [LR] * 3 + [0.7] * 3
    agree(
        updates.clip_by_rms(0.7),
        lambda p, g, t, m: p - lr_of[t - 1] * g / max(1.0, rms(g) / 0.7),
        shape,
        change={"lr": 0.7},
    )


@every_shape
def test_momentum_after_the_learning_rate_averages_steps(shape):
    lr_of = [LR] * 3 + [0.7] * 3
    chain = optstate.chain(updates.scale_by_learning_rate(), updates.momentum(beta=0.8))
    agree(chain, lambda p, g, t, m: p - ema(m, "m", lr_of[t - 1] * g, 0.2), shape, change={"lr": 0.7})


@every_shape
def test_momentum_before_the_learning_rate_averages_updates(shape):
    lr_of = [LR] * 3 + [0.7] * 3
    agree(
        updates.momentum(beta=0.8), lambda p, g, t, m: p - lr_of[t - 1] * ema(m, "m", g, 0.2), shape, change={"lr": 0.7}
    )


def test_the_learning_rate_cannot_be_applied_twice():
    with pytest.raises(ValueError, match="learning rate twice"):
        optstate.chain(updates.scale_by_learning_rate(), updates.scale_by_learning_rate())


# --- second moments ------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("exponent", [0.8, 0.5])
def test_scale_by_rms_in_full_with_power_decay(shape, exponent):
    def rule(p, g, t, m):
        return p - LR * g / np.sqrt(ema(m, "v", g * g + 1e-3, t**-exponent))

    agree(updates.scale_by_rms(Full(), decay=updates.power_decay(exponent), eps=1e-3), rule, shape)


@every_shape
def test_scale_by_rms_in_full_with_a_constant_starts_from_zero_uncorrected(shape):
    def rule(p, g, t, m):
        return p - LR * g / np.sqrt(ema(m, "v", g * g + 1e-3, 0.1))

    agree(updates.scale_by_rms(Full(), decay=updates.constant(0.9), eps=1e-3), rule, shape)


@every_matrix
def test_scale_by_rms_factored_is_adafactors_second_moment(shape):
    def rule(p, g, t, m):
        return p - LR * g / np.sqrt(factored_second_moment(g, m, t**-0.8, 1e-30))

    agree(updates.scale_by_rms(Factored()), rule, shape)


@every_matrix
def test_scale_by_rms_factored_with_a_constant(shape):
    def rule(p, g, t, m):
        return p - LR * g / np.sqrt(factored_second_moment(g, m, 0.1, 1e-3))

    agree(updates.scale_by_rms(Factored(), decay=updates.constant(0.9), eps=1e-3), rule, shape)


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_scale_by_rms_factored_keeps_vectors_in_full(shape):
    def rule(p, g, t, m):
        return p - LR * g / np.sqrt(ema(m, "v", g * g + 1e-30, t**-0.8))

    agree(updates.scale_by_rms(Factored()), rule, shape)


@every_shape
def test_weight_decay_before_a_second_moment_is_an_l2_penalty(shape):
    def rule(p, g, t, m):
        u = g + 0.3 * p
        return p - LR * u / np.sqrt(ema(m, "v", u * u + 1e-3, t**-0.8))

    agree(optstate.chain(updates.add_decayed_weights(0.3), updates.scale_by_rms(Full(), eps=1e-3)), rule, shape)


@every_matrix
def test_weight_decay_before_a_factored_moment_is_an_l2_penalty(shape):
    def rule(p, g, t, m):
        u = g + 0.3 * p
        return p - LR * u / np.sqrt(factored_second_moment(u, m, t**-0.8, 1e-30))

    agree(optstate.chain(updates.add_decayed_weights(0.3), updates.scale_by_rms(Factored())), rule, shape)


@every_shape
def test_weight_decay_after_a_second_moment_is_decoupled(shape):
    def rule(p, g, t, m):
        return p - LR * (g / np.sqrt(ema(m, "v", g * g + 1e-3, t**-0.8)) + 0.3 * p)

    agree(optstate.chain(updates.scale_by_rms(Full(), eps=1e-3), updates.add_decayed_weights(0.3)), rule, shape)


@every_shape
def test_a_floor_bounds_the_second_moment_in_full(shape):
    def rule(p, g, t, m):
        return p - LR * g / np.sqrt(np.maximum(ema(m, "v", g * g, t**-0.8), 0.5**2))

    agree(updates.scale_by_rms(Full(), eps=0.0, floor=0.5), rule, shape)


@every_matrix
def test_a_floor_bounds_a_factored_second_moment_as_in_torch_adafactor(shape):
    def rule(p, g, t, m):
        row = ema(m, "row", (g * g).mean(-1, keepdims=True), t**-0.8)
        col = ema(m, "col", (g * g).mean(-2, keepdims=True), t**-0.8)
        v = row * col / np.maximum(row.mean(-2, keepdims=True), 0.5)
        return p - LR * g / np.sqrt(np.maximum(v, 0.5**2))

    agree(updates.scale_by_rms(Factored(), eps=0.0, floor=0.5), rule, shape)


@every_shape
def test_adalomo_is_algorithm_1(shape):
    def rule(p, g, t, m):
        g = np.clip(g, -5.0, 5.0)
        moment = factored_second_moment if g.ndim >= 2 else second_moment
        u = g / np.sqrt(moment(g, m, t**-0.8, 1e-30))
        u = u / max(1.0, rms(u) / 0.6)
        return p - LR * max(1e-3, rms(p)) * (u + 0.3 * p)

    chain = optstate.chain(
        updates.clip_by_value(5.0),
        updates.scale_by_rms(Factored(), decay=updates.power_decay(0.8), eps=1e-30),
        updates.clip_by_rms(0.6),
        updates.add_decayed_weights(0.3),
        updates.scale_by_param_rms(1e-3),
    )
    agree(chain, rule, shape)


@pytest.mark.parametrize("limit", [1 << 18, 8])
def test_an_unused_row_beside_large_gradients_does_not_spoil_the_parameter(limit):
    # Gradients of a summed loss, 3e4, and one embedding row without any. In fp32: 1e-30 beside 1e9.
    chain = optstate.chain(updates.scale_by_rms(Factored()), updates.clip_by_rms(1.0))
    param = torch.nn.Parameter(torch.ones(4, 3))
    param.grad = torch.full((4, 3), 3e4)
    param.grad[1] = 0
    with mock.patch.object(chunking, "CPU_CHUNK", limit):
        optstate.Optimizer([("p", param)], chain, lr=0.1).step()
    # The statistic has rank one, so the update is 1 in the rows that have gradients, its RMS 0.87.
    want = torch.full((4, 3), 0.9)
    want[1] = 1
    torch.testing.assert_close(param.detach(), want, rtol=1e-6, atol=0)


# --- Adam ----------------------------------------------------------------------------------------------------------


def adam(g: Array, t: int, m: dict[str, Any], beta1: float = 0.8, beta2: float = 0.95, eps: float = 1e-3) -> Array:
    first = ema(m, "m", g, 1 - beta1) / (1 - beta1**t)
    second = ema(m, "v", g * g, 1 - beta2) / (1 - beta2**t)
    return first / (np.sqrt(second) + eps)


ADAM = updates.scale_by_adam(betas=(0.8, 0.95), eps=1e-3)
# Plain numbers in these chains are stepped by PyTorch's own AdamW; a learning rate that is a tensor is not.
lr_kinds = pytest.mark.parametrize("lr", [LR, torch.tensor(LR, dtype=torch.float64)], ids=["number", "tensor"])


@every_shape
@lr_kinds
def test_scale_by_adam_is_algorithm_1(shape, lr):
    agree(ADAM, lambda p, g, t, m: p - LR * adam(g, t, m), shape, lr=lr)


@every_shape
@lr_kinds
def test_adam_with_weight_decay_after_it_is_adamw(shape, lr):
    chain = optstate.chain(ADAM, updates.add_decayed_weights(0.3))
    agree(chain, lambda p, g, t, m: p - LR * (adam(g, t, m) + 0.3 * p), shape, lr=lr)


@every_shape
@lr_kinds
def test_adam_with_weight_decay_before_it_is_l2(shape, lr):
    chain = optstate.chain(updates.add_decayed_weights(0.3), ADAM)
    agree(chain, lambda p, g, t, m: p - LR * adam(g + 0.3 * p, t, m), shape, lr=lr)


@lr_kinds
def test_adam_with_betas_of_zero_is_a_sign(lr):
    chain = updates.scale_by_adam(betas=(0.0, 0.0), eps=1e-38)
    agree(chain, lambda p, g, t, m: p - LR * np.sign(g), (4, 3), lr=lr)


@every_matrix
def test_adam_takes_a_factored_second_moment(shape):
    def rule(p, g, t, m):
        first = ema(m, "m", g, 0.2) / (1 - 0.8**t)
        second = factored_second_moment(g, m, 0.05, 0.0) / (1 - 0.95**t)
        return p - LR * first / (np.sqrt(second) + 1e-3)

    agree(updates.scale_by_adam(second=Factored(), betas=(0.8, 0.95), eps=1e-3), rule, shape)


# --- momentum ------------------------------------------------------------------------------------------------------


@every_shape
def test_momentum_is_an_average(shape):
    agree(updates.momentum(beta=0.8), lambda p, g, t, m: p - LR * ema(m, "m", g, 0.2), shape)


@every_shape
def test_nesterov_momentum_looks_one_average_ahead(shape):
    def rule(p, g, t, m):
        return p - LR * (0.8 * ema(m, "m", g, 0.2) + 0.2 * g)

    agree(updates.momentum(beta=0.8, nesterov=True), rule, shape)


def heavy_ball(g: Array, m: dict[str, Any], dampening: float) -> Array:
    m["b"] = 0.8 * m["b"] + (1 - dampening) * g if "b" in m else g
    return m["b"]


@every_shape
@pytest.mark.parametrize("dampening", [0.0, 0.25])
def test_heavy_ball_momentum_accumulates_and_begins_with_the_gradient_itself(shape, dampening):
    chain = updates.momentum(beta=0.8, heavy_ball=True, dampening=dampening)
    agree(chain, lambda p, g, t, m: p - LR * heavy_ball(g, m, dampening), shape)


@every_shape
def test_nesterov_with_the_heavy_ball(shape):
    chain = updates.momentum(beta=0.8, heavy_ball=True, nesterov=True)
    agree(chain, lambda p, g, t, m: p - LR * (g + 0.8 * heavy_ball(g, m, 0.0)), shape)


@every_shape
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("ball", [False, True], ids=["average", "heavy ball"])
def test_momentum_absorbs_a_decay_before_it_unless_decoupled(shape, ball, decoupled):
    def rule(p, g, t, m):
        u = g if decoupled else g + 0.3 * p
        u = heavy_ball(u, m, 0.0) if ball else ema(m, "m", u, 0.2)
        return p - LR * (u + 0.3 * p if decoupled else u)

    momentum = updates.momentum(beta=0.8, heavy_ball=ball, decoupled=decoupled)
    agree(optstate.chain(updates.add_decayed_weights(0.3), momentum), rule, shape)


@every_shape
@pytest.mark.parametrize("ball", [False, True], ids=["average", "heavy ball"])
def test_momentum_leaves_a_decay_after_it_alone(shape, ball):
    def rule(p, g, t, m):
        return p - LR * ((heavy_ball(g, m, 0.0) if ball else ema(m, "m", g, 0.2)) + 0.3 * p)

    momentum = updates.momentum(beta=0.8, heavy_ball=ball)
    agree(optstate.chain(momentum, updates.add_decayed_weights(0.3)), rule, shape)


@every_shape
def test_momentum_after_a_clip_keeps_its_average_exact_in_a_chain_that_needs_sums(shape):
    def rule(p, g, t, m):
        return p - LR * ema(m, "m", g / max(1.0, rms(g) / 0.7), 0.2)

    agree(optstate.chain(updates.clip_by_rms(0.7), updates.momentum(beta=0.8)), rule, shape)


def lion(g: Array, m: dict[str, Any]) -> Array:
    direction = np.sign(0.6 * m.get("m", 0.0) + 0.4 * g)
    ema(m, "m", g, 0.05)
    return direction


@every_shape
def test_sign_momentum_is_lions_algorithm_2(shape):
    chain = optstate.chain(updates.sign_momentum(betas=(0.6, 0.95)), updates.add_decayed_weights(0.3))
    agree(chain, lambda p, g, t, m: p - LR * (lion(g, m) + 0.3 * p), shape)


@every_shape
def test_sign_momentum_takes_the_sign_of_a_decay_before_it_too(shape):
    chain = optstate.chain(updates.add_decayed_weights(0.3), updates.sign_momentum(betas=(0.6, 0.95)))
    agree(chain, lambda p, g, t, m: p - LR * lion(g + 0.3 * p, m), shape)


# --- hyper-parameters ----------------------------------------------------------------------------------------------


def after_the_change(old: Any, new: Any) -> Callable[[int], Any]:
    return lambda t: old if t < 4 else new


RMSPROP = {
    "decay_rate": updates.scale_by_rms(Full(), decay=updates.power_decay(0.8), eps=1e-3),
    "beta2": updates.scale_by_rms(Full(), decay=updates.constant(0.9), eps=1e-3),
    "eps": updates.scale_by_rms(Full(), decay=updates.constant(0.5), eps=1e-3),
    "floor": updates.scale_by_rms(Full(), decay=updates.constant(0.5), eps=0.0, floor=0.1),
}
CHANGES = {  # key: chain, value before, value after, the update with the value x
    "clip_threshold": (updates.clip_by_rms(0.7), 0.7, 0.1, lambda x, p, g, t, m: g / max(1.0, rms(g) / x)),
    "clip_norm": (updates.clip_by_norm(1.0), 1.0, 0.1, lambda x, p, g, t, m: g * min(1, x / (norm(g) + 1e-6))),
    "clip_grad_value": (updates.clip_by_value(0.4), 0.4, 0.1, lambda x, p, g, t, m: np.clip(g, -x, x)),
    "weight_decay": (updates.add_decayed_weights(0.0), 0.0, 0.3, lambda x, p, g, t, m: g + x * p),
    "param_rms_eps": (updates.scale_by_param_rms(1e-3), 1e-3, 5.0, lambda x, p, g, t, m: max(x, rms(p)) * g),
    "momentum": (updates.momentum(beta=0.8), 0.8, 0.5, lambda x, p, g, t, m: ema(m, "m", g, 1 - x)),
    "decay_rate": (RMSPROP["decay_rate"], -0.8, -0.3, lambda x, p, g, t, m: g / np.sqrt(second_moment(g, m, t**x))),
    "beta2": (RMSPROP["beta2"], 0.9, 0.5, lambda x, p, g, t, m: g / np.sqrt(second_moment(g, m, 1 - x))),
    "eps": (RMSPROP["eps"], 1e-3, 0.5, lambda x, p, g, t, m: g / np.sqrt(second_moment(g, m, eps=x))),
    "floor": (
        RMSPROP["floor"],
        0.1,
        2,
        lambda x, p, g, t, m: g / np.sqrt(np.maximum(second_moment(g, m, eps=0), x**2)),
    ),
    "betas": (ADAM, (0.8, 0.95), (0.5, 0.9), lambda x, p, g, t, m: adam(g, t, m, *x)),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_number_changed_in_the_param_group_takes_effect_at_the_next_step(key):
    chain, old, new, update = CHANGES[key]
    current = after_the_change(old, new)

    agree(chain, lambda p, g, t, m: p - LR * update(current(t), p, g, t, m), (4, 3), change={key: new})
    unchanged = run(chain, (4, 3))
    changed = run(chain, (4, 3), change={key: new})
    assert (unchanged[2] == changed[2]).all()
    assert (unchanged[-1] != changed[-1]).any()


@pytest.mark.parametrize("key", ["clip_threshold", "clip_norm", "clip_grad_value"])
def test_a_clip_is_switched_off_by_none_in_the_param_group(key):
    chain, old, _, update = CHANGES[key]
    agree(chain, lambda p, g, t, m: p - LR * (update(old, p, g, t, m) if t < 4 else g), (4, 3), change={key: None})


def test_groups_have_their_own_numbers():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "weight_decay": 0.5, "lr": 1.0}]
    opt = optstate.Optimizer(groups, updates.add_decayed_weights(0.1), lr=0.1)
    for param in params:
        param.grad = torch.ones(3)
    opt.step()
    assert params[0].tolist() == pytest.approx([1 - 0.1 * (1 + 0.1)] * 3)
    assert params[1].tolist() == pytest.approx([1 - (1 + 0.5)] * 3)


def test_hyper_gives_two_transforms_of_one_kind_keys_of_their_own():
    def rule(second):
        def step(p, g, t, m):
            u = g / max(1.0, rms(g) / 0.9)
            u = np.clip(u, -0.5, 0.5)
            return p - LR * u / max(1.0, rms(u) / second(t))

        return step

    first = updates.clip_by_rms(updates.hyper("first_clip", 0.9))
    chain = optstate.chain(first, updates.clip_by_value(0.5), updates.clip_by_rms(0.3))
    assert chain.hyper == {"first_clip": 0.9, "clip_grad_value": 0.5, "clip_threshold": 0.3}
    agree(chain, rule(lambda t: 0.3), (4, 3))
    agree(chain, rule(after_the_change(0.3, 0.2)), (4, 3), change={"clip_threshold": 0.2})


def test_hyper_puts_a_number_into_a_tuple_of_the_param_group():
    second_moment = updates.scale_by_rms(Full(), eps=updates.hyper("eps", 1e-3, index=0))
    chain = optstate.chain(second_moment, updates.scale_by_param_rms(updates.hyper("eps", 0.5, index=1)))
    assert chain.hyper == {"decay_rate": -0.8, "eps": (1e-3, 0.5)}

    def rule(p, g, t, m):
        eps = (1e-3, 0.5) if t < 4 else (1e-2, 3.0)
        return p - LR * max(eps[1], rms(p)) * g / np.sqrt(ema(m, "v", g * g + eps[0], t**-0.8))

    agree(chain, rule, (4, 3), change={"eps": (1e-2, 3.0)})


def test_hyper_renames_the_exponent_of_power_decay_and_the_beta_of_constant():
    powers = updates.scale_by_rms(Full(), decay=updates.power_decay(updates.hyper("power", -0.5)), eps=1e-30)
    assert powers.hyper == {"power": -0.5, "eps": 1e-30}
    agree(powers, lambda p, g, t, m: p - LR * g / np.sqrt(ema(m, "v", g * g, t**-0.5)), (4, 3))
    steady = updates.scale_by_rms(Full(), decay=updates.constant(updates.hyper("memory", 0.9)), eps=1e-30)
    assert steady.hyper == {"memory": 0.9, "eps": 1e-30}


def test_transforms_that_agree_on_a_default_share_a_key():
    chain = optstate.chain(updates.clip_by_rms(0.9), updates.scale_by_rms(Full(), eps=1e-3), updates.clip_by_rms(0.9))
    assert chain.hyper == {"clip_threshold": 0.9, "decay_rate": -0.8, "eps": 1e-3}


# --- what is refused -----------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[BaseException], *names: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for name in names:
        assert name in message


def test_two_defaults_for_one_key_are_refused():
    with pytest.raises(ValueError, match="different defaults") as error:
        optstate.chain(updates.clip_by_rms(1.0), updates.clip_by_rms(2.0))
    one_line(error, "'clip_threshold'", "1.0", "2.0", "hyper(")


def test_two_chains_of_a_route_keep_their_own_defaults():
    route = optstate.route([("*bias", updates.clip_by_rms(1.0))], default=updates.clip_by_rms(2.0))
    params = [(name, torch.nn.Parameter(torch.zeros(3))) for name in ("a", "a.bias")]
    optimizer = optstate.Optimizer(params, route)
    assert [group["clip_threshold"] for group in optimizer.param_groups] == [1.0, 2.0]
    assert [group["param_names"] for group in optimizer.param_groups] == [["a.bias"], ["a"]]


def test_a_number_and_a_tuple_under_one_key_are_refused():
    with pytest.raises(ValueError, match="is a number for one step of the recipe and a tuple for another") as error:
        optstate.chain(updates.scale_by_rms(Full()), updates.scale_by_param_rms(updates.hyper("eps", 1e-3, index=1)))
    one_line(error, "'eps'")


@pytest.mark.parametrize("key", ["lr", "params", "role"])
def test_a_key_that_the_optimizer_itself_uses_is_refused(key):
    with pytest.raises(ValueError, match=repr(key)) as error:
        updates.hyper(key, 2.0)
    one_line(error, repr(key))


@pytest.mark.parametrize(
    ("transforms", "slot"),
    [
        ((updates.scale_by_rms(Full()), updates.scale_by_rms(Factored())), "exp_avg_sq"),
        ((updates.scale_by_adam(), updates.momentum()), "exp_avg"),
        ((updates.momentum(), updates.momentum()), "exp_avg"),
        ((updates.momentum(heavy_ball=True), updates.momentum(heavy_ball=True)), "momentum_buffer"),
        ((updates.sign_momentum(), updates.momentum()), "exp_avg"),
    ],
)
def test_two_statistics_in_one_slot_are_refused(transforms, slot):
    with pytest.raises(ValueError, match="two transforms keep a slot named") as error:
        optstate.chain(*transforms)
    one_line(error, repr(slot))


def test_slots_of_their_own_names_stand_side_by_side():
    chain = optstate.chain(updates.momentum(beta=0.8), updates.momentum(beta=0.8, slot="second"))

    def rule(p, g, t, m):
        return p - LR * ema(m, "second", ema(m, "first", g, 0.2), 0.2)

    agree(chain, rule, (4, 3))
    param = torch.nn.Parameter(torch.zeros(3))
    assert set(optstate.Optimizer([param], chain).state[param]) == {"step", "exp_avg", "second"}


@pytest.mark.parametrize("slot", ["step", "a.b", "two words", "1st"])
def test_an_unusable_slot_name_is_refused(slot):
    with pytest.raises(ValueError, match="is not usable") as error:
        optstate.chain(updates.momentum(slot=slot))
    one_line(error, repr(slot))


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: updates.clip_by_rms(0.0), ("clip_threshold", "0.0")),
        (lambda: updates.clip_by_rms(-1.5), ("clip_threshold", "-1.5")),
        (lambda: updates.clip_by_rms(float("nan")), ("clip_threshold", "nan")),
        (lambda: updates.clip_by_norm(-1.5), ("clip_norm", "-1.5")),
        (lambda: updates.clip_by_value(-1.5), ("clip_grad_value", "-1.5")),
        (lambda: updates.scale_by_param_rms(-1e-3), ("param_rms_eps", "-0.001")),
        (lambda: updates.add_decayed_weights(-0.1), ("weight_decay", "-0.1")),
        (lambda: updates.scale_by_rms(Full(), eps=-1.0), ("eps", "-1.0")),
        (lambda: updates.scale_by_rms(Full(), floor=-1.0), ("floor", "-1.0")),
        (lambda: updates.scale_by_adam(betas=(1.0, 0.9)), ("betas[0]", "1.0")),
        (lambda: updates.scale_by_adam(betas=(0.9, 1.5)), ("betas[1]", "1.5")),
        (lambda: updates.scale_by_adam(betas=(0.9, -0.5)), ("betas[1]", "-0.5")),
        (lambda: updates.scale_by_adam(betas=(0.9,)), ("betas", "(0.9,)", "2")),
        (lambda: updates.scale_by_adam(eps=-1.0), ("eps", "-1.0")),
        (lambda: updates.sign_momentum(betas=(0.9, 1.0)), ("betas[1]", "1.0")),
        (lambda: updates.momentum(beta=1.0), ("momentum", "1.0")),
        (lambda: updates.momentum(beta=-0.1), ("momentum", "-0.1")),
        (lambda: updates.momentum(dampening=1.5), ("dampening", "1.5")),
        (lambda: updates.power_decay(-0.5), ("decay_rate", "0.5")),
        (lambda: updates.power_decay(2.5), ("decay_rate", "2.5")),
        (lambda: updates.constant(1.5), ("beta2", "1.5")),
        (lambda: updates.clip_by_rms(updates.hyper("mine", -1.5)), ("mine", "-1.5")),
    ],
)
def test_a_number_out_of_range_is_refused_by_name_and_value(build, names):
    with pytest.raises(ValueError, match="out of range|must be 2 numbers") as error:
        build()
    one_line(error, *names)


@pytest.mark.parametrize(
    ("key", "value", "chain"),
    [
        ("clip_threshold", -1.5, updates.clip_by_rms(1.0)),
        ("betas", (0.9, 1.5), updates.scale_by_adam()),
        ("decay_rate", 0.5, updates.scale_by_rms(Full())),
        ("weight_decay", -0.1, updates.add_decayed_weights(0.0)),
    ],
)
def test_a_number_out_of_range_in_a_param_group_is_refused(key, value, chain):
    with pytest.raises(ValueError, match="out of range") as error:
        optstate.Optimizer([{"params": [torch.nn.Parameter(torch.zeros(3))], key: value}], chain)
    one_line(error, key, repr(value[1] if isinstance(value, tuple) else value))


def test_the_range_in_a_message_does_not_hold_the_value():
    with pytest.raises(ValueError, match="out of range") as error:
        updates.momentum(beta=1.0)
    assert "from 0 to 1" not in str(error.value)


@pytest.mark.parametrize("value", ["0.5", True, [1.0], None])
def test_what_is_not_a_number_is_refused(value):
    with pytest.raises(TypeError, match="must be a number") as error:
        updates.scale_by_param_rms(value)
    one_line(error, "param_rms_eps", repr(value))


@pytest.mark.parametrize("item", [updates.clip_by_rms, 1.0, None, Full()])
def test_a_chain_takes_transforms_only(item):
    with pytest.raises(TypeError, match="give transforms") as error:
        optstate.chain(item)
    one_line(error)
