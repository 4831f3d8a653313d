"""Your own loop under accelerate, AdaLomo fused into the backward pass: python examples/accelerate_loop.py (seconds).

Clipping by the global norm is shown, too: gradients are gone after a fused backward, so `accelerator.clip_grad_norm_`
would find nothing to clip. The norm is measured first.
"""

from __future__ import annotations

from accelerate import Accelerator
from small_llama import small_llama, steps_from_command_line, windows
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import optstate
from adalomo import AdaLomo


def main() -> None:
    """Train, and print how far the loss went down."""
    steps = steps_from_command_line(__doc__)
    accelerator = Accelerator()
    model = small_llama()
    optimizer = AdaLomo(model.named_parameters(), lr=5e-2)
    scheduler = CosineAnnealingLR(optimizer, T_max=steps)
    batches = DataLoader(windows(16 * steps), batch_size=16)
    fused = optstate.fuse_backward(
        optimizer, clip_grad_norm=1.0
    )  # stepped instead: leave this out, and grad_norm below
    model, optimizer, scheduler, batches = accelerator.prepare(model, optimizer, scheduler, batches)

    losses = []
    for batch in batches:
        loss = model(**batch).loss
        fused.grad_norm(loss)  # only measures; without clip_grad_norm it is not needed
        accelerator.backward(loss)  # updates every parameter and frees its gradient
        optimizer.step()  # closes the step
        scheduler.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte in {steps} steps")


if __name__ == "__main__":
    main()
