"""Pauses of Python's garbage collector: short, without loss, and without a trace in the caller's program."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
from optstate_cli import app
from typer.testing import CliRunner

from optstate.collector import paused

pytestmark = pytest.mark.slow


class Ring:
    """Garbage that only the collector frees."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    """The collector is on before and after each test."""
    gc.enable()
    yield
    gc.unfreeze()
    gc.enable()


def test_it_is_off_inside_and_on_again_afterwards_errors_included() -> None:
    with pytest.raises(KeyError), paused():
        inside = gc.isenabled()
        raise KeyError
    assert not inside
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with paused():
        pass
    assert not gc.isenabled()


def test_a_pause_within_a_pause_does_not_end_it() -> None:
    with paused():
        with paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_was_made_inside_is_old_can_be_found_and_is_collected_as_garbage() -> None:
    with paused():
        ring = Ring()
        for _ in range(10 * gc.get_threshold()[0]):  # enough for a collection, were it on
            _garbage = Ring()
        watched = weakref.ref(_garbage)
        del _garbage
        assert watched() is not None
    assert any(item is ring for item in gc.get_objects(generation=2))  # where refusals of engines look for them
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert watched() is None


def test_what_a_program_froze_stays_frozen() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    with paused():
        _ring = Ring()
    assert gc.get_freeze_count() == before > 0


def test_a_command_leaves_the_collector_as_it_was() -> None:
    result = CliRunner().invoke(app, ["recipes"])
    assert result.exit_code == 0
    assert gc.isenabled()


@pytest.mark.parametrize(("command", "pauses"), [("estimate", True), ("recipes", True), ("inspect", False)])
def test_commands_that_import_torch_do_so_in_a_pause(command: str, pauses: bool) -> None:
    code = (
        "import gc\n"
        "from optstate_cli import app\n"
        "seen = []\n"
        f"app.registered_commands = [c for c in app.registered_commands if c.callback.__name__ != {command!r}]\n"
        f"app.command({command!r})(lambda: seen.append(gc.isenabled()))\n"
        f"app([{command!r}], standalone_mode=False)\n"
        "print(seen, gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [f"[{not pauses}]", "True"]
