"""What every test run needs."""

import signal

# A run in the background of a shell ignores Ctrl-C, and hands that on to the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
