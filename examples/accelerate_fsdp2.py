"""AdaLomo fused into the backward pass of a model that accelerate shards with FSDP2 over several processes.

    torchrun --nproc-per-node 2 examples/accelerate_fsdp2.py --steps 30
    accelerate launch --multi-gpu --num-processes 2 examples/accelerate_fsdp2.py --steps 30

`prepare` wants the optimizer beside the model, and puts sharded parameters in the place of those it was built with.
They are taken over with their state, sharded as they are; `accelerator.save_state` and `load_state` work as ever.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from small_llama import small_llama, steps_from_command_line, windows
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import optstate
from adalomo import AdaLomo


def main() -> None:
    """Train, and print how far the loss went down."""
    steps = steps_from_command_line(__doc__)
    if not torch.cuda.is_available():
        shard_on_cpus()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(fsdp_plugin=plugin)
    processes = accelerator.num_processes
    model = small_llama()
    optimizer = AdaLomo(model.named_parameters(), lr=5e-2)
    scheduler = CosineAnnealingLR(optimizer, T_max=steps * processes)  # accelerate steps it once for each process
    batches = DataLoader(windows(16 * steps), batch_size=16 // processes, drop_last=True)
    model, prepared, scheduler, batches = accelerator.prepare(model, optimizer, scheduler, batches)
    optstate.fuse_backward(optimizer)  # after `prepare`, so that the first gradients are freed, too

    losses = []
    for batch in batches:
        loss = model(**batch).loss
        accelerator.backward(loss)  # updates the parameters and frees their gradients, one FSDP group after the other
        prepared.step()  # closes the step
        scheduler.step()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte in {len(losses)} steps")
    accelerator.print(f"{optimizer.state_nbytes()} bytes of state in this process of {processes}")
    accelerator.end_training()


def shard_on_cpus() -> None:
    """Without GPUs, accelerate ignores an FSDP plugin, although FSDP2 works: count these processes as those of GPUs."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    main()
