"""Names that a pickle has only to do something when it is read: to run code or a command, to reach files or machines.

Nothing here calls what a file names, so this is no defence: it is what a person should be told of a file, instead of
the other values in it. Imports nothing.
"""

from __future__ import annotations

__all__ = ["is_harmful"]

_MODULES = frozenset(
    (
        *("os", "posix", "nt", "subprocess", "commands", "popen2", "pty", "shutil", "signal", "tempfile"),
        *("ctypes", "_ctypes", "cffi", "runpy", "importlib", "imp", "zipimport", "code", "codeop", "marshal"),
        *("pdb", "bdb", "timeit", "profile", "cProfile", "trace", "pydoc", "doctest", "webbrowser", "antigravity"),
        *("pip", "ensurepip", "venv", "idlelib", "distutils", "setuptools"),
        *("socket", "_socket", "ssl", "http", "httplib", "urllib", "urllib2", "ftplib", "smtplib", "telnetlib"),
        *("requests", "aiohttp", "paramiko", "fabric", "pexpect", "_posixsubprocess", "_winapi", "winreg", "_winreg"),
    )
)
"""Modules of which a saved value needs nothing but what `_VALUES` has."""

_VALUES = frozenset(
    f"{module}.{name}"
    for module in ("os", "posix", "nt")
    for name in ("stat_result", "statvfs_result", "uname_result", "terminal_size", "times_result", "PathLike")
) | frozenset(
    (
        *(f"signal.{name}" for name in ("Signals", "Handlers", "Sigmasks")),
        *(f"socket.{name}" for name in ("AddressFamily", "SocketKind")),
        "importlib.metadata.PackagePath",
        "http.HTTPStatus",
    )
)
"""Plain values of these modules."""

_BUILTINS = frozenset(
    (
        *("eval", "exec", "execfile", "compile", "open", "file", "__import__", "breakpoint", "input", "raw_input"),
        *("print", "exit", "quit", "help", "globals", "locals", "vars", "setattr", "delattr", "reload", "apply"),
    )
)

_FUNCTIONS = frozenset(
    (
        *(f"{module}.load" for module in ("pickle", "_pickle", "cPickle", "dill", "joblib")),
        *(f"{module}.loads" for module in ("pickle", "_pickle", "cPickle", "dill")),
        *(f"sys.{name}" for name in ("exit", "settrace", "setprofile", "modules", "addaudithook")),
        *("io.open", "_io.open", "_io.FileIO", "io.FileIO", "pathlib.Path.write_text", "torch.load", "torch.hub.load"),
    )
)

_WITHIN = frozenset(("os", "posix", "nt", "subprocess", "pty", "shutil", "builtins", "__builtins__", "__globals__"))
"""Modules that other modules have imported: `torch.serialization.os.system` is `os.system`, too."""


def is_harmful(name: str) -> bool:
    """Whether a full name, as "os.system", is one of a function or class that no saved value needs."""
    if name in _VALUES:
        return False
    first, *rest = name.split(".")
    if first == "builtins" and len(rest) == 1:
        return rest[0] in _BUILTINS
    return first in _MODULES or name in _FUNCTIONS or not _WITHIN.isdisjoint(rest)
