"""The command line, installed as the package `optstate_cli`."""

from optstate_cli.main import app

__all__ = ["app"]
