"""Models to trace, and the same steps with values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optstate
from optstate.memory import peak_extra_bytes
from optstate.memory.model import BuildOptions, Model, ParamShape, Setting
from optstate.memory.sources.modules import default_dtype

Recipe = Callable[..., optstate.Optimizer]
Build = Callable[[BuildOptions], nn.Module]
Batch = Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]]


class MLP(nn.Module):
    """Two matrices with a ReLU between them; returns the sum of the outputs."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden, bias=False)
        self.second = nn.Linear(hidden, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))).sum()


class Block(nn.Module):
    """A hidden layer around its input."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Tokens(nn.Module):
    """An embedding, layers, and a head, tied or not; returns the cross-entropy of predicting its inputs."""

    def __init__(
        self, vocabulary: int = 1000, width: int = 16, layers: int = 1, tied: bool = False, hidden: int = 16
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), ids.flatten())


def model_of(build: Build, batch: Batch, layers: int | None = None) -> Model:
    module = build(BuildOptions())
    shapes = (ParamShape(n, tuple(p.shape), "float32", p.requires_grad) for n, p in module.named_parameters())
    return Model(type(module).__name__, tuple(shapes), "a test", layers=layers, build=build, batch=batch)


def token_batch(count: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.zeros(count, length, dtype=torch.long),), {}


def tokens(layers: int = 1, **options: Any) -> Model:
    def build(built: BuildOptions) -> nn.Module:
        return Tokens(layers=built.layers or layers, **options)

    return model_of(build, token_batch, layers=layers)


def llama(layers: int = 4, tied: bool = False, **sizes: Any) -> Model:
    """A small LLaMA of transformers: by default 3.3 million parameters."""
    transformers = __import__("transformers")
    config = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "vocab_size": 1000, **sizes}

    def build(options: BuildOptions) -> nn.Module:
        made = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **config,
                num_hidden_layers=options.layers or layers,
                tie_word_embeddings=tied,
                attn_implementation=options.attention,
                use_cache=False,
            )
        )
        if options.checkpointing:
            enable = getattr(made, "activation_checkpointing_enable", made.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        return made.train()

    def batch(count: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = torch.zeros(count, length, dtype=torch.long)
        return (), {"input_ids": ids, "labels": ids}

    return model_of(build, batch, layers=layers)


def real_peak(model: Model, recipe: Recipe, setting: Setting) -> int:
    """The most bytes that are alive in a warm step on the CPU: what is there before it, and what the step adds.

    The transforms make the step, as they do in a rehearsal; whole steps need less.
    """
    assert model.build is not None
    assert model.batch is not None
    torch.manual_seed(0)
    with default_dtype(getattr(torch, setting.dtype)):
        module = model.build(BuildOptions(None, setting.attention, setting.checkpointing))
    args, kwargs = model.batch(setting.batch_size, setting.seq_len)
    optimizer = recipe(optstate.declare_roles(module))
    optimizer.use_backend("eager")
    clips, count = setting.clip == "norm", setting.grad_accum
    if setting.fused_backward:
        optstate.fuse_backward(optimizer, 1.0 if clips else None)
    fused = optimizer.fused

    def loss_of() -> Tensor:
        output = module(*args, **kwargs)
        loss: Tensor = output if isinstance(output, Tensor) else output.loss
        return loss / count if count > 1 else loss

    def step() -> None:
        for number in range(count):
            loss = loss_of()
            if fused and (number < count - 1 or (clips and count > 1)):
                with fused.accumulate():
                    loss.backward()
                continue
            if fused and clips:
                fused.grad_norm(loss)
            loss.backward()
        del loss
        if clips and not fused:
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    inputs = {id(value): value for value in [*args, *kwargs.values()]}.values()
    there = [*module.parameters(), *module.buffers(), *inputs]
    return sum(t.untyped_storage().nbytes() for t in there) + optimizer.state_nbytes() + peak_extra_bytes(step)
