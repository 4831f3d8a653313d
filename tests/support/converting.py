"""Running `optstate convert`, and checkpoints to convert."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from optstate_cli import app
from torch import nn
from typer.testing import CliRunner, Result

import optstate


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def convert(source: Path, target: Path, *options: Any) -> str:
    """The output of a conversion that must succeed."""
    result = invoke("convert", source, target, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def converted(source: Path, target: Path, *options: Any) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(convert(source, target, "--json", *options))
    return tree


def refused(code: int, *arguments: Any) -> str:
    """The one line on stderr of a command that must fail; of a wrong use, the words in typer's frame."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    if code == 2:
        lines = (line.strip("│╭╰─╮╯ ") for line in result.stderr.splitlines())
        return " ".join(line for line in lines if line)
    assert result.stderr.startswith("optstate: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def model_of(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.ParameterDict:
    torch.manual_seed(seed)
    return nn.ParameterDict({f"p{i}": nn.Parameter(torch.randn(shape).to(dtype)) for i, shape in enumerate(shapes)})


SHAPES = ((96, 64), (128, 64), (128,))


def train(model: nn.Module, optimizer: Any, first: int, count: int, unused: tuple[str, ...] = ()) -> None:
    """Steps with gradients that are a function of the step."""
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for name, param in model.named_parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = None if name in unused or not param.requires_grad else grad
        optimizer.step()


def trained(build: Callable[[Any], Any], shapes: Any = SHAPES, steps: int = 3, **options: Any) -> tuple[Any, Any]:
    model = model_of(shapes, **options)
    optimizer = build(model)
    train(model, optimizer, 0, steps)
    return model, optimizer


def native(folder: Path, build: Callable[[Any], Any], name: str = "a.safetensors", **options: Any) -> Path:
    optstate.save(trained(build, **options)[1], folder / name)
    return folder / name


def torch_file(folder: Path, build: Callable[[Any], Any], **options: Any) -> Path:
    torch.save(trained(build, **options)[1].state_dict(), folder / "opt.pt")
    return folder / "opt.pt"
