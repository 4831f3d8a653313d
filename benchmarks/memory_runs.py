"""A LLaMA of any size through transformers: traced, and trained for a step on the CPU."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import optstate
from optstate.memory import peak_extra_bytes
from optstate.memory.model import BuildOptions, Model, ParamShape, Setting
from optstate.memory.sources.modules import default_dtype

SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "vocab_size": 1000}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}


def llama(sizes: dict[str, int], layers: int, tied: bool = False) -> Model:
    """Return the model that transformers builds, without its cache."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(options: BuildOptions) -> nn.Module:
        config = LlamaConfig(
            **sizes,
            num_hidden_layers=options.layers or layers,
            tie_word_embeddings=tied,
            attn_implementation=options.attention,
            use_cache=False,
        )
        model = LlamaForCausalLM(config)
        if options.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        return model.train()

    def batch(count: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = torch.zeros(count, length, dtype=torch.long)
        return (), {"input_ids": ids, "labels": ids}

    with torch.device("meta"):
        named = list(build(BuildOptions()).named_parameters())
    shapes = tuple(ParamShape(name, tuple(param.shape), "float32") for name, param in named)
    return Model("LLaMA", shapes, "transformers", layers=layers, build=build, batch=batch)


def real_bytes(model: Model, recipe: Callable[..., optstate.Optimizer], setting: Setting) -> tuple[int, int]:
    """Measure the bytes alive before a warm step on the CPU, and the most that the step adds."""
    assert model.build is not None
    assert model.batch is not None
    torch.manual_seed(0)
    with default_dtype(getattr(torch, setting.dtype)):
        module = model.build(BuildOptions(None, setting.attention, setting.checkpointing))
    _, inputs = model.batch(setting.batch_size, setting.seq_len)
    optimizer = recipe(optstate.declare_roles(module))
    if setting.fused_backward:
        optstate.fuse_backward(optimizer, 1.0 if setting.clip == "norm" else None)

    def step() -> None:
        train(module, inputs, optimizer, setting)

    step()
    there = [*module.parameters(), *module.buffers(), *{id(x): x for x in inputs.values()}.values()]
    before = sum(tensor.untyped_storage().nbytes() for tensor in there) + optimizer.state_nbytes()
    return before, peak_extra_bytes(step)


def train(module: nn.Module, inputs: dict[str, Tensor], optimizer: optstate.Optimizer, setting: Setting) -> None:
    """Take one step as a user writes it."""
    count, clips, fused = setting.grad_accum, setting.clip == "norm", optimizer.fused
    for number in range(count):
        loss = module(**inputs).loss / count if count > 1 else module(**inputs).loss
        waits = number < count - 1 or (clips and count > 1)
        if fused and clips and not waits:
            fused.grad_norm(loss)
        with fused.accumulate() if fused and waits else nullcontext():
            loss.backward()
        del loss
    if clips and not fused:
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def large_run() -> dict[str, Any]:
    """Measure the wall-clock time and the memory of the command that estimates LLaMA-7B, from its start on."""
    command = [str(Path(sys.executable).with_name("optstate")), "estimate", "llama-7b", "--checkpointing", "--json"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    answer = json.load(process.stdout)["recipes"][0]
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    assert status == 0
    return {
        "peak": answer["peak_bytes"],
        "phase": answer["peak_phase"],
        "seconds": seconds,
        "rss": usage.ru_maxrss * 1024,
    }
