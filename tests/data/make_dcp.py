"""Writes dcp_two_ranks/ and dcp_optstate/ into a folder: `python tests/data/make_dcp.py FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from optstate.recipes import AdamW8bit


def two_ranks(rank: int, folder: str) -> None:
    """AdamW under FSDP2: one weight is cut by columns, the others by rows, unevenly."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29877", RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
    by_columns = model[0].weight
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda param: Shard(1) if param is by_columns else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps(model, optimizer, 6)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"app": {"model": weights, "optim": state}}, checkpoint_id=f"{folder}/dcp_two_ranks")
    dist.destroy_process_group()


def own(folder: str) -> None:
    """This library's 8-bit AdamW: one matrix large enough for codes, and the rest in full."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.LayerNorm(80))
    optimizer = AdamW8bit(model.named_parameters(), lr=0.01)
    steps(model, optimizer, 64)
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=f"{folder}/dcp_optstate", no_dist=True)


def steps(model: nn.Module, optimizer: Any, width: int) -> None:
    for _ in range(3):
        model(torch.randn(4, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(exist_ok=True)
    mp.spawn(two_ranks, (sys.argv[1],), nprocs=2)
    own(sys.argv[1])
