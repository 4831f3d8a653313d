"""Linear layers in 8 bits: what they compute, what they cost, and how a step is written back to them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import optstate
from adalomo import AdaLomo
from optstate import updates
from optstate.kernels import chunking
from optstate.recipes import AdamW, AdamW8bit, QGaLore
from optstate.testing.devices import noise
from optstate.weights import QuantizedWeight, quantize_linear

RECIPES: dict[str, Callable[..., optstate.Optimizer]] = {
    "adamw": lambda params: AdamW(params, 3e-3),
    "adamw8bit": lambda params: AdamW8bit(params, 3e-3),
    "adalomo": lambda params: AdaLomo(params, 1e-2),
    "qgalore": lambda params: QGaLore(params, 3e-2, rank=16, update_proj_gap=10),
}


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 64))
    with torch.no_grad():
        for i, param in enumerate(made.parameters()):
            param.copy_(noise(param.shape, i) * 0.1)
    return made.to(dtype)


def quantized(**more: Any) -> nn.Sequential:
    made = model(**more)
    assert quantize_linear(made) == ["0.weight", "2.weight"]
    return made


def weight_of(layer: Any) -> QuantizedWeight:
    assert isinstance(layer.weight, QuantizedWeight)
    return layer.weight


def trained(net: nn.Module, optimizer: Any, steps: int) -> float:
    for step in range(steps):
        loss = (net(noise((32, 96), step)) - noise((32, 64), 1000) * 0.3).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


def test_a_weight_takes_one_byte_and_a_scale_per_block() -> None:
    layer = nn.Linear(512, 64)
    quantize_linear(layer, block=128)
    weight = weight_of(layer)
    assert (weight.codes.dtype, weight.scales.dtype, weight.block) == (torch.int8, torch.float32, 128)
    kept = sum(t.numel() * t.element_size() for t in (weight.codes, weight.scales))
    assert kept == weight.numel() * (1 + 4 / 128)
    assert isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.shape, weight.is_leaf, weight.requires_grad) == (torch.float32, (64, 512), True, True)


def test_values_are_within_half_a_code_of_what_was_given() -> None:
    layer = nn.Linear(256, 64)
    dense = layer.weight.detach().clone()
    quantize_linear(layer, block=64)
    blocks = dense.view(64, 4, 64)
    spacing = blocks.abs().amax(-1, keepdim=True) / 127
    off = (weight_of(layer).dequantize().view(64, 4, 64) - blocks).abs()
    assert (off <= 0.5001 * spacing).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_and_gradients_are_those_of_the_values(dtype: torch.dtype) -> None:
    ours = quantized(dtype=dtype)
    dense = copy.deepcopy(ours)
    for layer in (dense[0], dense[2]):
        layer.weight = nn.Parameter(weight_of(layer).dequantize())
    x = noise((4, 8, 96), 3).to(dtype)
    results = []
    for net in (ours, dense):
        given = x.clone().requires_grad_()
        net(given).square().sum().backward()
        results.append([given.grad, *(param.grad for param in net.parameters())])
    assert torch.equal(ours(x), dense(x))
    for mine, other in zip(*results, strict=True):
        assert type(mine) is Tensor
        close = 1e-5 if dtype is torch.float32 else 2e-2  # other shapes of products: other orders of sums
        assert (mine - other).abs().max() <= close * other.abs().max()


def test_autocast_computes_in_its_dtype() -> None:
    net = quantized()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(noise((4, 96), 1))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32


def test_a_step_is_right_on_average_and_off_by_a_code_at_most() -> None:
    """2**16 weights, each off by up to a spacing at random: the mean is within five standard errors."""
    layer = nn.Linear(256, 256, bias=False)
    quantize_linear(layer)
    weight = weight_of(layer)
    before = weight.dequantize()
    optimizer = optstate.Optimizer([("w", weight)], updates.chain(), lr=1.0)
    spacing = float(weight.scales.max())
    step = 0.1 * spacing * noise((256, 256), 5).abs()
    weight.grad = step.clone()
    optimizer.step()
    off = weight_of(layer).dequantize() - (before - step)
    assert off.abs().max() <= 1.01 * spacing
    assert abs(float(off.mean())) <= 5 * 0.5 * spacing / 256
    assert float(step.mean()) > 10 * 5 * 0.5 * spacing / 256 / 2, "the step itself would be lost in this error"
    moved = weight_of(layer).dequantize() - before
    assert float((moved * -step).sum() / step.square().sum()) == pytest.approx(1.0, abs=0.1)


def test_a_step_of_zero_changes_no_code() -> None:
    net = quantized()
    optimizer = AdaLomo(net.named_parameters(), 0.0)
    before = [(weight_of(net[i]).codes.clone(), weight_of(net[i]).scales.clone()) for i in (0, 2)]
    trained(net, optimizer, 3)
    for (codes, scales), i in zip(before, (0, 2), strict=True):
        assert torch.equal(weight_of(net[i]).codes, codes)
        assert (weight_of(net[i]).scales / scales - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("name", RECIPES)
def test_training_follows_dense_weights_fused_and_stepped(name: str) -> None:
    """Rounding is the whole difference: the loss ends within 3 % of that of fp32 weights, and both ways agree."""
    dense = model()
    losses = [trained(dense, RECIPES[name](dense.named_parameters()), 20)]
    nets = []
    for fused in (False, True):
        net = quantized()
        optimizer = RECIPES[name](net.named_parameters())
        assert {plan.spec.name: str(plan.weights) for plan in optimizer.plan()}["0.weight"] == "Quantized(block=96)"
        if fused:
            optstate.fuse_backward(optimizer)
        losses.append(trained(net, optimizer, 20))
        nets.append(net)
    assert losses[1] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    for i in (0, 2):
        assert torch.equal(weight_of(nets[0][i]).codes, weight_of(nets[1][i]).codes)
        assert torch.equal(weight_of(nets[0][i]).scales, weight_of(nets[1][i]).scales)


@pytest.mark.parametrize("name", ["adamw8bit", "adalomo", "qgalore"])
def test_slices_begin_where_blocks_do(name: str) -> None:
    """Stepped in slices of a thousand elements, as weights larger than a cache are, the result is the same."""
    results = []
    for chunk in (1 << 19, 1 << 12):
        with mock.patch.object(chunking, "CPU_CHUNK", chunk):
            net = quantized()
            trained(net, RECIPES[name](net.named_parameters()), 3)
            results.append(weight_of(net[0]).dequantize())
    spacing = weight_of(net[0]).scales.max()
    assert (results[0] - results[1]).abs().max() <= 1.01 * spacing
    assert float((results[0] - results[1]).abs().mean()) <= 0.02 * float(spacing)


def test_a_fused_backward_keeps_no_gradient() -> None:
    net = quantized()
    optimizer = QGaLore(net.named_parameters(), fused_backward=True)
    net(noise((4, 96), 1)).sum().backward()
    assert all(param.grad is None for param in net.parameters())
    optimizer.step()


def test_weights_are_copied_saved_and_loaded_exactly() -> None:
    net = quantized()
    x = noise((4, 96), 9)
    wanted = net(x)
    assert torch.equal(copy.deepcopy(net)(x), wanted)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    other = quantized()
    trained(other, AdamW(other.named_parameters(), 1e-2), 2)
    assert not torch.equal(other(x), wanted)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(other(x), wanted)
    other.load_state_dict(model().state_dict())  # dense values are rounded to nearest, as at the beginning
    assert torch.equal(other(x), wanted)
    assert weight_of(other[0].to(torch.bfloat16)).dtype == torch.bfloat16


def test_a_run_resumes_exactly(tmp_path: Any) -> None:
    results = []
    for interrupted in (False, True):
        net = quantized()
        optimizer = RECIPES["qgalore"](net.named_parameters())
        trained(net, optimizer, 3)
        if interrupted:
            optstate.save(optimizer, tmp_path / "state.safetensors")
            net = copy.deepcopy(net)
            optimizer = RECIPES["qgalore"](net.named_parameters())
            optstate.load(optimizer, tmp_path / "state.safetensors")
        trained(net, optimizer, 3)
        results.append(weight_of(net[0]).codes)
    assert torch.equal(*results)


def test_writing_into_a_weight_is_refused() -> None:
    weight = weight_of(quantized()[0])
    with pytest.raises(TypeError, match="copy_"), torch.no_grad():
        weight.mul_(2.0)
    assert torch.equal(weight.detach() * 2, weight.dequantize() * 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 96)
        self.shared = nn.Linear(96, 64, bias=False)
        self.hidden = nn.Linear(96, 96)
        self.small = nn.Linear(32, 32)
        self.odd = nn.Linear(97, 97)
        self.prime = nn.Linear(1009, 64)
        self.lm_head = nn.Linear(96, 64, bias=False)
        self.shared.weight = self.embedding.weight


def test_heads_embeddings_and_small_weights_stay_as_they_are() -> None:
    net = Tied()
    assert quantize_linear(net) == ["hidden.weight", "odd.weight"]
    assert weight_of(net.odd).block == 97
    assert net.shared.weight is net.embedding.weight
    assert quantize_linear(net) == []


def test_a_bad_gradient_changes_nothing() -> None:
    net = quantized()
    optimizer = QGaLore(net.named_parameters(), 1e-2)
    weight = weight_of(net[0])
    before = weight.codes.clone()
    weight.grad = torch.full((128, 96), torch.nan)
    with pytest.raises(optstate.NonFiniteGradientError):
        optimizer.step()
    assert torch.equal(weight.codes, before)


def test_wrong_uses_are_refused() -> None:
    with pytest.raises(ValueError, match="block=8"):
        quantize_linear(model(), block=8)
    with pytest.raises(ValueError, match="quantize_linear"):
        AdamW(model().named_parameters(), weights=optstate.weights.Quantized())
