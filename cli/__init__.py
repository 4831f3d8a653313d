"""The command line, installed as the package `optstate_cli`."""

from .main import app

__all__ = ["app"]
