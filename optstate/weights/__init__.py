"""Ways to write the new value of a parameter: rounded to nearest, stochastically, or with bits kept beside it."""

from optstate.spec import ParamSpec
from optstate.text import parse_item
from optstate.weights.base import Weights
from optstate.weights.kahan import Kahan
from optstate.weights.plain import Plain
from optstate.weights.quantized import Quantized, QuantizedWeight, quantize_linear
from optstate.weights.split import Split
from optstate.weights.stochastic import StochasticRounding

__all__ = [
    "Kahan",
    "Plain",
    "Quantized",
    "QuantizedWeight",
    "Split",
    "StochasticRounding",
    "Weights",
    "as_weights",
    "parse_weights",
    "quantize_linear",
]


def as_weights(weights: Weights | str, spec: ParamSpec) -> Weights:
    """Return the way in which one parameter is written.

    Args:
        weights: one of this package's classes, or "auto": StochasticRounding for bf16 and fp16 parameters, else Plain.
        spec: of the parameter.

    Raises:
        TypeError: for anything else.
        ValueError: if a parameter of this dtype cannot be written in this way.
    """
    if weights == "auto":
        weights = StochasticRounding()
    if not isinstance(weights, Weights):
        raise TypeError(
            f'weights={weights!r}: give "auto", weights.Plain(), weights.StochasticRounding(seed), weights.Kahan() or '
            "weights.Split(bits)"
        )
    return weights.resolve(spec)


def parse_weights(text: str) -> Weights:
    """Make the way to write weights that `text` describes as it is printed, such as "Split(bits=8)".

    Raises:
        ValueError: if `text` describes none.
    """
    kinds: tuple[type[Weights], ...] = (Kahan, Plain, Split, StochasticRounding)
    return parse_item(text, {kind.__name__.lower(): kind for kind in kinds})
