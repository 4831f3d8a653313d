"""AdaLomo fused into the backward pass of a model that FSDP2 shards over several processes.

    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 30

Shard first, then build the optimizer, then fuse. The state is sharded as the parameters are; `optstate.save`, called
by every process, gathers it into the one file that an unsharded run would write, and torch.distributed.checkpoint
works, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from corpus import read_corpus
from gpt import GPT
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import optstate
from adalomo import AdaLomo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--corpus", type=Path, help="text to train on; Python's standard library without it")
    parser.add_argument("--save", type=Path, help="write the optimizer's state here at the end")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(device, (world,))

    torch.manual_seed(0)
    model = GPT().to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = AdaLomo(model.named_parameters(), lr=0.05)
    optstate.fuse_backward(optimizer)  # leave this out, and step() updates

    corpus = read_corpus(options.corpus, model.config.context)
    for step in range(options.steps):
        inputs, targets = (
            part.chunk(world)[rank].to(device) for part in corpus.batch(step, 8, model.config.context, 0)
        )
        loss = model.loss(inputs, targets)
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == options.steps - 1:
            mean = loss.detach().clone()
            dist.all_reduce(mean, op=dist.ReduceOp.SUM)
            if rank == 0:
                print(f"step {step}: loss {mean.item() / world:.3f}, {optimizer.state_nbytes()} bytes of state here")
    if options.save:
        optstate.save(optimizer, options.save)  # every rank takes part, rank 0 writes
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
