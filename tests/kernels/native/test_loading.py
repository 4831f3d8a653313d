"""Opening the compiled library, choosing a backend, and sharing work among threads."""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optstate
from optstate import kernels
from optstate.kernels import backend, native
from optstate.kernels.native import loading, threads
from optstate.kernels.triton_steps import availability
from optstate.optimizer.whole_steps.base import is_plain
from optstate.recipes import Lion
from tests.support.compiled import needs_compiled_steps
from tests.support.forks import starter


def lion() -> optstate.Optimizer:
    param = nn.Parameter(torch.ones(3, 4))
    param.grad = torch.ones(3, 4)
    return Lion([("p", param)])


# --- where the library is missing -----------------------------------------------------------------------------------


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where nothing was compiled, and nothing has been said of it."""
    with monkeypatch.context() as patch:
        patch.setattr(loading, "find_library", lambda: None)
        patch.setattr(loading, "opened", loading.opened.__wrapped__)
        patch.setattr(backend, "_WARNED", set())
        backend._functions_of.cache_clear()
        assert kernels.compiled_functions() is None
        yield
    backend._functions_of.cache_clear()


SLOW = (
    r"^optstate makes the steps of parameters on cpu with PyTorch's operations, several times as slowly as it could: "
    r"the library of compiled steps cannot be used, as it was not compiled when optstate was installed, which needs "
    r"a C compiler such as gcc; to get them install a C compiler, then optstate again "
    r"\(pip install --force-reinstall --no-deps\). OPTSTATE_BACKEND=eager says that this is meant and is silent$"
)


@pytest.mark.usefixtures("no_library")
def test_steps_that_are_slow_for_want_of_the_library_are_said_once() -> None:
    """At the first optimizer, with the line that built it; not where parameters have no values."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Lion([("m", nn.Parameter(torch.ones(2, device="meta")))])
    with pytest.warns(UserWarning, match=SLOW) as caught:
        lion()
    assert caught[0].filename == __file__
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lion()


@pytest.mark.usefixtures("no_library")
def test_who_chose_eager_is_not_told_that_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "CHOSEN_OUTSIDE", "eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = lion()
    assert optimizer.plan().steps == ("transforms (eager was chosen)",)


@pytest.mark.usefixtures("no_library")
def test_the_library_that_the_environment_asks_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "CHOSEN_OUTSIDE", "native")
    words = r'^OPTSTATE_BACKEND=native cannot be used: it was not compiled .*gcc; "auto" takes what there is$'
    with pytest.raises(ValueError, match=words):
        lion()


@pytest.mark.usefixtures("no_library")
@pytest.mark.filterwarnings("ignore:optstate makes the steps")
def test_without_a_library_steps_are_eager_and_the_plan_says_why() -> None:
    optimizer = lion()
    optimizer.step()
    (words,) = optimizer.plan().steps
    assert words.startswith("transforms (no compiled steps: it was not compiled when optstate was installed")
    assert "\n" not in words
    with pytest.raises(ValueError, match=r'^backend="native" cannot be used: it was not compiled .*gcc; "auto" takes'):
        optimizer.use_backend("native")
    assert not bool(kernels.all_finite(torch.tensor([1.0, float("nan")])))


@needs_compiled_steps
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "ABI_VERSION", -1)
    functions, why = loading.opened.__wrapped__()
    assert not functions
    assert why == "it was compiled from another version of optstate: install optstate again"


def test_a_file_that_is_no_library_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "_steps.so"
    path.write_bytes(b"no library")
    monkeypatch.setattr(loading, "find_library", lambda: path)
    functions, why = loading.opened.__wrapped__()
    assert not functions
    assert why.startswith("it cannot be opened: ")
    assert "\n" not in why


@pytest.mark.usefixtures("no_library")
def test_a_function_of_a_missing_library_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="the compiled steps of optstate cannot be used: it was not compiled"):
        native.function("within")


# --- choosing -------------------------------------------------------------------------------------------------------


@needs_compiled_steps
@pytest.mark.parametrize(
    ("given", "words"),
    [(" Eager ", "transforms (eager was chosen)"), ("native", "compiled"), ("", "compiled"), (None, "compiled")],
)
def test_the_environment_variable_counts_where_the_optimizer_leaves_it_open(
    given: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is read when the module is imported, which is done here once more, under another name."""
    if given is None:
        monkeypatch.delenv("OPTSTATE_BACKEND", raising=False)
    else:
        monkeypatch.setenv("OPTSTATE_BACKEND", given)
    monkeypatch.setattr(backend, "CHOSEN_OUTSIDE", runpy.run_path(backend.__file__)["CHOSEN_OUTSIDE"])
    optimizer = lion()
    assert optimizer.plan().steps == (words,)
    optimizer.use_backend("native")
    assert optimizer.plan().steps == ("compiled",)


def test_another_word_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "CHOSEN_OUTSIDE", "fast")
    with pytest.raises(ValueError, match=r"OPTSTATE_BACKEND='fast' is no backend: give auto, eager, native"):
        lion().plan()


@needs_compiled_steps
def test_a_backend_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step falls to PyTorch's operations where something else was asked for by name."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(availability, "is_installed", lambda: True)
    optimizer = lion()
    words = r"cannot be used: no steps in Triton: Triton's kernels run on CUDA devices, not on cpu; \"auto\" takes what"
    with pytest.raises(ValueError, match=f'^backend="triton" {words}'):
        optimizer.use_backend("triton")
    assert optimizer.plan().steps == ("compiled",)
    monkeypatch.setattr(backend, "CHOSEN_OUTSIDE", "triton")
    with pytest.raises(ValueError, match=f"^OPTSTATE_BACKEND=triton {words}"):
        lion()
    with pytest.raises(ValueError, match=r'^backend="native" cannot be used: no compiled steps for cuda; "auto" takes'):
        backend.require_device("native", torch.device("cuda"))


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="backend='fast': give one of auto, eager, native"):
        lion().use_backend("fast")


@needs_compiled_steps
def test_the_plan_says_what_makes_each_step() -> None:
    params = [("p", nn.Parameter(torch.ones(3, 4))), ("m", nn.Parameter(torch.ones(2, device="meta")))]
    optimizer = Lion(params)
    assert optimizer.plan().steps == ("compiled", "transforms (no compiled steps for meta)")
    assert "compiled" in str(optimizer.plan())
    optimizer.use_backend("eager")
    assert optimizer.plan().steps == ("transforms (eager was chosen)",) * 2


# --- the check of gradients -----------------------------------------------------------------------------------------


@needs_compiled_steps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_element_is_looked_at(dtype: torch.dtype) -> None:
    for count in (1, 15, 1024, 1025, 5000):
        for place in {0, count // 2, count - 1}:
            for bad in (float("nan"), float("inf"), -float("inf")):
                grad = torch.full((count,), torch.finfo(dtype).max, dtype=dtype)
                assert bool(kernels.all_finite(grad))
                grad[place] = bad
                assert not bool(kernels.all_finite(grad))


@needs_compiled_steps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_magnitude_is_still_allowed(dtype: torch.dtype) -> None:
    largest = float(torch.tensor(1e3, dtype=dtype))
    beyond = torch.nextafter(torch.tensor(largest, dtype=dtype), torch.tensor(torch.inf, dtype=dtype))
    assert bool(kernels.all_finite(torch.tensor([largest, -largest], dtype=dtype), largest))
    assert not bool(kernels.all_finite(torch.stack([beyond, beyond]), largest))
    assert not bool(kernels.all_finite(-torch.stack([beyond, beyond]), largest))


@needs_compiled_steps
def test_only_tensors_with_numbers_where_they_say_are_read_by_address() -> None:
    plain = torch.ones(4)
    assert is_plain(plain, nn.Parameter(torch.ones(2)), torch.ones(0), torch.tensor(1.0))
    assert not is_plain(plain, plain.to("meta"))
    assert not is_plain(torch.ones(4, 4).t()[1:])
    assert not is_plain(torch.ones(3).expand(2, 3))
    assert not is_plain(torch._neg_view(plain))
    assert not is_plain(plain.as_subclass(type("Own", (torch.Tensor,), {})))


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("count", "step"), [(1, 1), (2, 1), (7, 3), (300_000, 1024), (1025, 1024)])
def test_ranges_cover_everything_once_and_begin_at_steps(count: int, step: int) -> None:
    seen: list[tuple[int, int]] = []
    threads.share(lambda begin, end: seen.append((begin, end)), (), count, step, elements=1 << 20)
    seen.sort()
    assert seen[0][0] == 0
    assert seen[-1][1] == count
    assert all(a[1] == b[0] and b[0] % step == 0 for a, b in pairwise(seen))
    assert len(seen) == min(2, -(-count // step))


@pytest.mark.usefixtures("two_threads")
def test_little_work_stays_in_this_thread() -> None:
    seen: list[str] = []
    threads.share(lambda begin, end: seen.append(threading.current_thread().name), (), 100, 1, elements=100)
    assert seen == [threading.current_thread().name]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("place", [0, 1])
def test_an_error_comes_when_no_thread_works_any_more(place: int) -> None:
    """What the threads work on is freed when the error has left."""
    working: list[int] = []

    def work(begin: int, end: int) -> None:
        if begin == place:
            raise KeyError(begin)
        working.append(begin)
        time.sleep(0.1)
        working.clear()

    with pytest.raises(KeyError):
        threads.share(work, (), 2, 1, elements=1 << 20)
    assert not working


def share_in_a_child() -> None:
    """Use a thread, fork, and use one in the child, which has none of its parent's."""
    torch.set_num_threads(2)
    grad = torch.ones(threads.WORTH_SHARING)
    assert bool(kernels.all_finite(grad))
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if bool(kernels.all_finite(grad)) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status


@needs_compiled_steps
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_process_with_threads_makes_its_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = starter().run("tests.kernels.native.test_loading:share_in_a_child", log=log, timeout=60)
    assert code == 0, log.read_text()
