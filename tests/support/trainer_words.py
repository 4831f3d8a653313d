"""What the processes of `trainer_ranks` and their tests both speak of, without the trainers, which take seconds to
import."""

STEPS, SIZE, WORLD, CLIP = 2, 2, 2, 0.3

STEPPED, FUSED_BEFORE, FUSED_AFTER = "stepped", "fused before prepare", "fused after prepare"
