"""Check a store, a transform, a recipe or a format of your own against the laws that this library keeps.

    from optstate import testing

    def test_my_store() -> None:
        testing.check_store(Rounded(bits=8))

Every function raises `LawError`, an AssertionError of one line: which law, what is broken, for which shape and dtype,
and what goes wrong because of it. Each takes about a second, on a CPU, without process groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from optstate import updates
from optstate.formats import Format
from optstate.optimizer.optimizer import Optimizer
from optstate.stores import Store
from optstate.stores.registry import known_also
from optstate.testing.format_laws import FORMAT_LAWS, installed_format
from optstate.testing.laws import LawError, enforce
from optstate.testing.rule_laws import RULE_LAWS, Maker
from optstate.testing.store_laws import STORE_LAWS, chain_with, signs
from optstate.testing.trained_format_laws import LIBRARY_LAWS, Trial
from optstate.updates import Chain, Transform

__all__ = [
    "LAWS_OF_FORMATS",
    "LAWS_OF_LIBRARIES",
    "LAWS_OF_RULES",
    "LAWS_OF_STORES",
    "LawError",
    "check_format",
    "check_recipe",
    "check_store",
    "check_transform",
]

LAWS_OF_LIBRARIES = tuple(law.name for law in LIBRARY_LAWS)
"""What `check_format` asks besides where it can build an optimizer of the library itself."""

LAWS_OF_RULES = tuple(law.name for law in RULE_LAWS)
"""What `check_transform` and `check_recipe` ask of every chain."""

LAWS_OF_STORES = (*(law.name for law in STORE_LAWS), *LAWS_OF_RULES)
"""What `check_store` asks: of the store itself, then of chains that keep statistics in it."""

LAWS_OF_FORMATS = tuple(law.name for law in FORMAT_LAWS)
"""What `check_format` asks."""

LR = 1e-3


def check_store(store: Store, *, laws: Collection[str] | None = None) -> None:
    """Check a store by itself, then in optimizers that keep a moving average in it: of gradients, and of squares.

    store: need not be installed. laws: names of `LAWS_OF_STORES`, None for all.

    Raises:
        LawError: for the first law that it breaks.
        ValueError: for a name that no law has.
    """
    _refuse_unknown(laws, LAWS_OF_STORES)
    own = None if laws is None else [law.name for law in STORE_LAWS if law.name in laws]
    enforce(STORE_LAWS, store, str(store), own)
    of_rules = None if laws is None else [name for name in LAWS_OF_RULES if name in laws]
    if of_rules == []:
        return
    with known_also(type(store)):
        for signed in signs(store):
            chain = chain_with(store, signed)
            rule = Maker(str(store), lambda params, chain=chain: Optimizer(params, chain, lr=LR))
            enforce(RULE_LAWS, rule, f"{store} in {chain}", of_rules)


def check_transform(transform: Transform, *, laws: Collection[str] | None = None) -> None:
    """Check a transform in a chain by itself, or a whole chain.

    transform: hyper-parameters without a default are taken from its `hyper`. laws: names of `LAWS_OF_RULES`, None for
    all.

    Raises:
        LawError: for the first law that it breaks.
        ValueError: for a name that no law has.
    """
    chain = transform if isinstance(transform, Chain) else updates.chain(transform)
    enforce(RULE_LAWS, Maker(str(chain), lambda params: Optimizer(params, chain, lr=LR)), str(chain), laws)


def check_recipe(recipe: Callable[..., Optimizer], *, laws: Collection[str] | None = None, **options: Any) -> None:
    """Check a recipe: a class of optimizers, or a function that makes one of parameters.

    options: hyper-parameters to call it with. laws: names of `LAWS_OF_RULES`, None for all.

    Raises:
        LawError: for the first law that it breaks.
        ValueError: for a name that no law has.
    """
    words = getattr(recipe, "__name__", repr(recipe))
    enforce(RULE_LAWS, Maker(words, lambda params: recipe(params, **options)), words, laws)


def check_format(
    declared: Format,
    build: Callable[[list[nn.Parameter]], Any] | None = None,
    recipe: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    *,
    laws: Collection[str] | None = None,
) -> None:
    """Check a format: state of every rule in its `stores` is written in it, read, loaded, written again and damaged.

    declared: need not be installed. Of a format without `write` only its declaration can be checked, and that it claims
    nobody else's files. build: makes an optimizer of the library itself, whose state is then read, written and stepped
    on, too. recipe: makes ours of the same rule; by default the one that the format's rules name. laws: names of
    `LAWS_OF_FORMATS` and `LAWS_OF_LIBRARIES`, None for all.

    Raises:
        LawError: for the first law that it breaks.
        ValueError: for a name that no law has.
    """
    _refuse_unknown(laws, (*LAWS_OF_FORMATS, *LAWS_OF_LIBRARIES))
    of_formats, of_libraries = (
        None if laws is None else [name for name in laws if name in known]
        for known in (LAWS_OF_FORMATS, LAWS_OF_LIBRARIES)
    )
    enforce(FORMAT_LAWS, declared, f"format {declared.name!r}", of_formats)
    if build is not None:
        with installed_format(declared):
            enforce(LIBRARY_LAWS, Trial(declared, build, recipe), f"format {declared.name!r}", of_libraries)


def _refuse_unknown(laws: Collection[str] | None, known: Collection[str]) -> None:
    for name in laws or ():
        if name not in known:
            raise ValueError(f"no law is called {name!r}: there are {', '.join(known)}")
