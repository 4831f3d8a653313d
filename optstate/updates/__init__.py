"""Transforms: the steps of a recipe, from a gradient to the update that is subtracted from a parameter."""

from optstate.updates.adam_variants import (
    fading_momentum,
    scale_by_ademamix,
    scale_by_momentum_square,
    scale_by_moving_adam,
    scale_by_second_moment,
)
from optstate.updates.adaptive_rank import project_by_need
from optstate.updates.around import Around
from optstate.updates.base import Context, State, Transform, Update, run_transform
from optstate.updates.cautious import cautious
from optstate.updates.chain import Chain, Route, as_route, chain, route, transform_words
from optstate.updates.clip import clip_by_norm, clip_by_rms, clip_by_value
from optstate.updates.confidence import scale_by_confidence
from optstate.updates.eigenbasis import eigenbasis
from optstate.updates.hyper import Hyper, Rule, hyper
from optstate.updates.lazy_projection import project_lazily
from optstate.updates.line_rms import scale_by_line_rms
from optstate.updates.low_rank import (
    project,
    scale_by_projected,
    scale_by_residual_norm,
)
from optstate.updates.moments import (
    momentum,
    scale_by_adam,
    scale_by_rms,
    scale_by_rss,
    sign_momentum,
)
from optstate.updates.moving_projection import project_anew
from optstate.updates.orthogonal import normalize_columns, normalize_rows, orthogonalize
from optstate.updates.orthogonal_projection import orthogonalize_exactly, project_and_carry
from optstate.updates.projected import Projected
from optstate.updates.reshaped import as_square
from optstate.updates.row_selection import select_rows
from optstate.updates.scale import (
    add_decayed_weights,
    decay_weights_after,
    scale_by_factor,
    scale_by_learning_rate,
    scale_by_param_rms,
    scale_by_schedule,
)
from optstate.updates.schedule_free import schedule_free
from optstate.updates.schedules import Schedule, constant, power_decay

__all__ = [
    "Around",
    "Chain",
    "Context",
    "Hyper",
    "Projected",
    "Route",
    "Rule",
    "Schedule",
    "State",
    "Transform",
    "Update",
    "add_decayed_weights",
    "as_route",
    "as_square",
    "cautious",
    "chain",
    "clip_by_norm",
    "clip_by_rms",
    "clip_by_value",
    "constant",
    "decay_weights_after",
    "eigenbasis",
    "fading_momentum",
    "hyper",
    "momentum",
    "normalize_columns",
    "normalize_rows",
    "orthogonalize",
    "orthogonalize_exactly",
    "power_decay",
    "project",
    "project_and_carry",
    "project_anew",
    "project_by_need",
    "project_lazily",
    "route",
    "run_transform",
    "scale_by_adam",
    "scale_by_ademamix",
    "scale_by_confidence",
    "scale_by_factor",
    "scale_by_learning_rate",
    "scale_by_line_rms",
    "scale_by_momentum_square",
    "scale_by_moving_adam",
    "scale_by_param_rms",
    "scale_by_projected",
    "scale_by_residual_norm",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_second_moment",
    "schedule_free",
    "select_rows",
    "sign_momentum",
    "transform_words",
]
