"""Names in pickles: those that files of torch.save and torch.distributed.checkpoint may have, and those that do harm.

Both lists are fixed here. Imports no torch.
"""

from __future__ import annotations

from typing import Any

from optstate.checkpoint.files.dtypes import SAFETENSORS_NAMES, STORAGES
from optstate.checkpoint.files.pickle_machine import Global, Object, Stranger, Unread
from optstate.checkpoint.files.tensor_place import Stored
from optstate.text import shown

__all__ = ["KNOWN", "OTHER_STORAGES", "is_harmful", "type_name"]

OTHER_STORAGES = {
    "ComplexDoubleStorage": 16,
    "QInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt8Storage": 1,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
}
"""Bytes of an element in storages of numbers that the safetensors format has no name for."""

_OTHER_DTYPES = (
    *("complex32", "complex128", "float4_e2m1fn_x2", "qint8", "qint32", "quint8", "quint4x2", "quint2x4"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
)

_TORCH = (
    *SAFETENSORS_NAMES,
    *(f"torch.{name}" for name in _OTHER_DTYPES),
    *(f"{module}.{name}" for module in ("torch", "torch.cuda") for name in (*STORAGES, *OTHER_STORAGES)),
    "torch.storage.UntypedStorage",
    "torch.storage.TypedStorage",
    "torch.TypedStorage",
    "torch.Tensor",
    "torch.device",
    "torch.serialization._get_layout",
    "torch.per_tensor_affine",
    "torch.per_tensor_symmetric",
    "torch.per_channel_affine",
    "torch.per_channel_symmetric",
    "torch.per_channel_affine_float_qparams",
)

# States of random number generators. NumPy 2 has moved them.
_NUMPY = (
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.numeric._frombuffer",
)

# Statistics kept as tensor subclasses or as objects beside the tensors.
_OPTIMIZERS = (
    "torchao.optim.subclass_8bit.OptimState8bit",
    "torchao.optim.subclass_4bit.OptimState4bit",
    "torchao.optim.subclass_fp8.OptimStateFp8",
    "torchao.prototype.low_bit_optim.subclass_8bit.OptimState8bit",
    "torchao.prototype.low_bit_optim.subclass_4bit.OptimState4bit",
    "torchao.prototype.low_bit_optim.subclass_fp8.OptimStateFp8",
    "galore_torch.galore_projector.GaLoreProjector",
    "galore_torch.galore_projector_tensor.GaLoreProjectorTensor",
    "pytorch_optimizer.optimizer.galore_utils.GaLoreProjector",
    "pytorch_optimizer.optimizer.utils.galore.GaLoreProjector",
)

_DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)

# The .metadata of torch.distributed.checkpoint, and what it was made of in torch 2.0.
_DISTRIBUTED = (
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
)

KNOWN = frozenset((*_TORCH, *_NUMPY, *_OPTIMIZERS, *_DEEPSPEED, *_DISTRIBUTED))
"""Names of which nothing but the name is used; calls of them become inert objects."""


# --- names that do something ---------------------------------------------------------------------------------------
#
# Nothing here calls what a file names, so this is no defence: it is what a person should be told of a file, instead of
# the other values in it.

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


def type_name(value: Any) -> str:
    """Return what a value is, for messages: "a list"."""
    if isinstance(value, Stored):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Object | Stranger | Global):
        return f"a Python object, {shown(value.name)}"
    if isinstance(value, Unread):
        return f"{value.what}, which optstate does not read"
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
