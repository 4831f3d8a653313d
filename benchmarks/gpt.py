"""A small GPT: rotary positions, RMS norms, gated feed-forward, untied head. 66 tensors, 18.5 million parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.attention_norm(x)
        query, key, value = (self._split(layer(y)) for layer in (self.query, self.key, self.value))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))

    def _split(self, x: Tensor) -> Tensor:
        """Reshape `[batch, length, width]` to `[batch, heads, length, width / heads]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GPT(nn.Module):
    """A model whose output is the mean cross-entropy of predicting each token from those before it."""

    def __init__(
        self, vocabulary: int = 8000, width: int = 384, hidden: int = 1024, layers: int = 7, heads: int = 6
    ) -> None:
        super().__init__()
        self.head_size = width // heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for param in self.parameters():
            if param.ndim == 2:
                nn.init.normal_(param, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, :-1])
        angles = rotary_angles(x.shape[1], self.head_size)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), tokens[:, 1:].flatten())


def rotary_angles(length: int, size: int) -> Tensor:
    """Return the angles `[length, size / 2]` of the rotary position embedding."""
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
    return torch.outer(torch.arange(length).float(), frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs formed by the first and second half of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
