"""The model and the data of the trainer examples: a small Llama with random weights, bytes of Python's own sources."""

from __future__ import annotations

import argparse

import torch
from corpus import read_corpus
from torch import Tensor
from train_lm import OneLineParser, positive
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["small_llama", "steps_from_command_line", "windows"]

LENGTH = 64


def small_llama() -> LlamaForCausalLM:
    """Build a Llama of 117 thousand parameters over a vocabulary of bytes, from a fixed seed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **sizes))


def windows(count: int) -> list[dict[str, Tensor]]:
    """Return `count` stretches of text as models of transformers take them; the model shifts the labels by itself."""
    inputs, _ = read_corpus(None, LENGTH).batch(step=0, size=count, length=LENGTH, seed=0)
    return [{"input_ids": ids, "labels": ids} for ids in inputs]


def steps_from_command_line(description: str | None) -> int:
    """Parse the command line of the trainer examples, which have one option: the number of steps."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=60, help="optimizer steps (%(default)s)")
    return int(parser.parse_args().steps)
