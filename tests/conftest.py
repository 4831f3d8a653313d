"""What every test run needs."""

import signal

from hypothesis import settings

# A run in the background of a shell ignores Ctrl-C, and hands that on to the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The suite gives the same answer twice; `pytest --hypothesis-profile=explore` looks for what nobody has seen.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("same")
