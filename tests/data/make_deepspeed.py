"""Writes deepspeed_zero<stage>/ and its universal form into a folder: `python tests/data/make_deepspeed.py 1 FOLDER`.

Needs deepspeed; written with version 0.19.8 on a CPU (DS_ACCELERATOR=cpu), one process.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.fc1 = nn.Linear(8, 10)
        self.norm = nn.LayerNorm(10)
        self.fc2 = nn.Linear(10, 12, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.norm(self.fc1(self.embed(tokens)))))


def engine_of(model: nn.Module, stage: int) -> Any:
    """Two groups: in stage 3 the first is two flat sub-groups, in bfloat16 below that."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    matrices = [param for param in model.parameters() if param.ndim == 2]
    vectors = [param for param in model.parameters() if param.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, **({"sub_group_size": 150} if stage == 3 else {})},
        "bf16": {"enabled": stage != 3},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.001), config=config)[0]


def main(stage: int, folder: str) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29551"}
    os.environ.update(alone)
    torch.manual_seed(0)
    engine = engine_of(Tiny(), stage)
    for _ in range(3):
        tokens = torch.randint(0, 12, (4, 5))
        loss = nn.functional.cross_entropy(engine(tokens).float().view(-1, 12), tokens.roll(1, 1).view(-1))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(f"{folder}/deepspeed_zero{stage}", tag="global_step3")
    universal = f"--output_folder {folder}/deepspeed_universal{stage}/global_step3_universal --inject_missing_state"
    source = f"--input_folder {folder}/deepspeed_zero{stage}/global_step3"
    os.system(f"{sys.executable} -m deepspeed.checkpoint.ds_to_universal {source} {universal}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
