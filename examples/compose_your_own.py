"""A recipe of your own, put together from parts: python examples/compose_your_own.py (some seconds).

The recipe made here: matrices get Adafactor's factored second moment with Nesterov momentum behind it, while vectors
and embeddings, which are small or sparse, get plain AdamW. No library has it under a name; it is twelve lines.
"""

from __future__ import annotations

import torch
from corpus import read_corpus
from gpt import GPT, GPTConfig
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import optstate
from optstate import stores, updates

STEPS = 100

# 1. A chain is what a gradient goes through, from top to bottom. What is left at the end is multiplied by the
#    learning rate and subtracted from the parameter.

for_matrices = optstate.chain(
    # Divide by the root of the second moment. Factored() keeps it as row and column means: m + n numbers, not m * n.
    updates.scale_by_rms(stores.Factored(), decay=updates.power_decay(0.8), eps=1e-30),
    # One wild batch must not throw the weights far: the update's root mean square is at most 1.
    updates.clip_by_rms(1.0),
    # Average the updates and look one step ahead. How the average is kept is a choice of its own: bf16 here,
    # half of the fp32 that stores.Full() would take.
    updates.momentum(stores.Full("bfloat16"), beta=0.9, nesterov=True),
    # Pull weights towards zero. It stands behind the momentum, so the decay itself is not averaged.
    updates.add_decayed_weights(0.1),
    # Make the step relative: a learning rate of 0.01 now means "change a weight by about 1 %".
    updates.scale_by_param_rms(1e-3),
)

for_the_rest = optstate.chain(
    updates.scale_by_adam(betas=(0.9, 0.95), eps=1e-8),
    updates.add_decayed_weights(0.1),
)

# 2. A route says which chain a parameter gets: the first rule that matches, by name or by a function of its shape.
#    The numbers above become entries of param groups, and each chain has groups of its own: both call one `eps`.

recipe = optstate.route(
    [
        ("embedding.*", for_the_rest),
        ("position.*", for_the_rest),
        (optstate.is_vector, for_the_rest),
    ],
    default=for_matrices,
)


def is_relative(name: str, param: torch.Tensor) -> bool:
    """Return whether the parameter goes through `for_matrices`, whose learning rate is relative."""
    return param.ndim >= 2 and not name.startswith(("embedding.", "position."))


def main() -> None:
    """Compose, look at the plan, train."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=64, width=64, layers=2, heads=4))
    corpus = read_corpus(None, model.config.context)

    # 3. Param groups override any number of the recipe, as in every torch optimizer. AdamW's learning rate is not
    #    relative and must be smaller; embeddings and norms are not decayed.
    named = list(model.named_parameters())
    optimizer = optstate.Optimizer(
        [
            {"params": [(name, p) for name, p in named if is_relative(name, p)]},
            {"params": [(name, p) for name, p in named if not is_relative(name, p)], "lr": 3e-3, "weight_decay": 0.0},
        ],
        recipe,
        lr=6e-2,
    )

    # 4. The plan: which chain and which stores every parameter got, in bytes. A typo in a rule shows here.
    print(optimizer.plan())
    elements = sum(p.numel() for p in model.parameters())
    print(f"state: {optimizer.state_nbytes():,} bytes; AdamW in fp32 would keep {8 * elements:,}\n")

    # 5. Schedulers are torch's. They see one learning rate per group and scale each of them.
    scheduler = SequentialLR(
        optimizer,
        [LinearLR(optimizer, start_factor=0.1, total_iters=10), CosineAnnealingLR(optimizer, T_max=STEPS - 10)],
        milestones=[10],
    )

    # 6. The moment of the update is a choice, too. This one line moves it into the backward pass, where each
    #    gradient is freed as soon as it is used; without it, the same loop runs with ordinary steps and ends with
    #    the same weights.
    optstate.fuse_backward(optimizer)

    for step in range(STEPS):
        loss = model.loss(*corpus.batch(step, size=16, length=model.config.context, seed=0))
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 20 == 19:
            rates = ", ".join(f"{group['lr']:.4f}" for group in optimizer.param_groups)
            print(f"step {step + 1:>3}  loss {loss.item():.3f} nats per byte  learning rates {rates}")


if __name__ == "__main__":
    main()
