"""How a parameter is written."""

from optstate import text as describe
from optstate.spec import ParamSpec
from optstate.weights.base import Weights
from optstate.weights.kahan import Kahan
from optstate.weights.plain import Plain
from optstate.weights.split import Split
from optstate.weights.stochastic import StochasticRounding

__all__ = ["Kahan", "Plain", "Split", "StochasticRounding", "Weights", "as_weights", "from_words"]


def as_weights(weights: Weights | str, spec: ParamSpec) -> Weights:
    """How one parameter is written. `"auto"` is StochasticRounding for bf16 and fp16 parameters, else Plain.

    Raises:
        TypeError: for anything that is not a way to write weights.
        ValueError: if a parameter of this dtype cannot be written so.
    """
    if weights == "auto":
        weights = StochasticRounding()
    if not isinstance(weights, Weights):
        raise TypeError(
            f'weights={weights!r}: give "auto", weights.Plain(), weights.StochasticRounding(seed), weights.Kahan() or '
            "weights.Split(bits)"
        )
    return weights.resolve(spec)


def from_words(text: str) -> Weights:
    """The way to write weights that `text` names as it is printed: "Split(bits=8)".

    Raises:
        ValueError: if there is none.
    """
    kinds: tuple[type[Weights], ...] = (Kahan, Plain, Split, StochasticRounding)
    return describe.from_words(text, {kind.__name__.lower(): kind for kind in kinds})
