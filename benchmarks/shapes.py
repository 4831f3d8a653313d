"""Parameter sets with the shapes of LLaMA-like models, without the models' computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOCABULARY = 32000


@dataclass(frozen=True)
class ParameterSet:
    """One model's sizes: `width` and `hidden` are the two dimensions of its feed-forward matrices."""

    name: str
    width: int
    hidden: int
    layers: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return llama_shapes(self.width, self.hidden, self.layers)


SETS = (ParameterSet("25M", 384, 1024, 7), ParameterSet("110M", 768, 2048, 12))


def llama_shapes(width: int, hidden: int, layers: int, head: bool = False) -> dict[str, tuple[int, ...]]:
    """Return names and shapes: embedding, per layer 7 matrices and 2 norms, final norm, and the head if asked for."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (width, width)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (hidden, width)
        shapes[f"{layer}.mlp.up_proj.weight"] = (hidden, width)
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, hidden)
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if head:
        shapes["lm_head.weight"] = (VOCABULARY, width)
    return shapes


def small_shapes(blocks: int = 500) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of `4 * blocks` small tensors, 16,960 elements in the mean: 3 matrices and a vector."""
    of_block = {"down": (128, 256), "up": (96, 192), "gate": (128, 128), "norm": (256,)}
    return {f"blocks.{i}.{name}.weight": shape for i in range(blocks) for name, shape in of_block.items()}


def one_element_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the `9 layers + 3` names of a LLaMA-like model with a head, each with the shape of one element."""
    return dict.fromkeys(llama_shapes(1, 1, layers, head=True), (1,))


def module_of(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Build modules nested as the dotted names say, holding matrices of N(0, 0.02^2) and vectors of ones."""
    generator = torch.Generator().manual_seed(seed)
    root = nn.Module()
    for name, shape in shapes.items():
        value = torch.ones(shape) if len(shape) < 2 else torch.randn(shape, generator=generator).mul_(0.02)
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(value.to(dtype)))
    return root


def gradients_of(module: nn.Module, seed: int = 1) -> list[Tensor]:
    """Draw one gradient of N(0, 0.01^2) per parameter, in the parameter's dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).mul_(0.01).to(p.dtype) for p in module.parameters()]
