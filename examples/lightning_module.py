"""A LightningModule with AdaLomo fused into the backward pass: python examples/lightning_module.py (some seconds).

Lightning runs forward and backward inside `optimizer.step(closure)`; the fused update happens in there.
"""

from __future__ import annotations

from typing import Any

import lightning
from small_llama import small_llama, steps_from_command_line, windows
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from adalomo import AdaLomo


class LanguageModel(lightning.LightningModule):
    """A module trained by Lightning's automatic optimization; the manual way works as well."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.model = small_llama()
        self.steps = steps
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        # Stepped instead: leave out fused_backward. Trainer may then clip and accumulate, which is refused when fused.
        optimizer = AdaLomo(self.model.named_parameters(), lr=5e-2, fused_backward=True)
        schedule = {"scheduler": CosineAnnealingLR(optimizer, T_max=self.steps), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def main() -> None:
    """Train, and print how far the loss went down."""
    steps = steps_from_command_line(__doc__)
    module = LanguageModel(steps)
    trainer = lightning.Trainer(
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(windows(16 * steps), batch_size=16))
    print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f} nats per byte in {steps} steps")


if __name__ == "__main__":
    main()
