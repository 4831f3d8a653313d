"""What every test run needs."""

import gc
import signal

from hypothesis import settings

# A run in the background of a shell ignores Ctrl-C, or the end of its terminal, and hands that on to the processes that
# tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The suite gives the same answer twice; `pytest --hypothesis-profile=explore` looks for what nobody has seen.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("same")


def pytest_collection_finish() -> None:
    """Leave out of every search for garbage, and for engines among live objects, what was there before the tests."""
    gc.freeze()
