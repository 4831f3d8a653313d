"""The names that files of torch.save and torch.distributed.checkpoint may have, fixed here. Imports no torch."""

from __future__ import annotations

from typing import Any

from optstate.checkpoint.files.pickle_machine import Global, Object, Stranger, Unread
from optstate.checkpoint.files.tensor_place import Stored
from optstate.text import shown

__all__ = ["DTYPES", "KNOWN", "OTHER_STORAGES", "STORAGES", "type_name"]

DTYPES = {
    "torch.bool": "BOOL",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.uint16": "U16",
    "torch.int16": "I16",
    "torch.uint32": "U32",
    "torch.int32": "I32",
    "torch.uint64": "U64",
    "torch.int64": "I64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.complex64": "C64",
}
"""What the safetensors format calls torch's dtypes."""

STORAGES = {
    "UntypedStorage": "U8",
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
}
"""The dtypes of torch's storage classes, in the safetensors format's words; those of any device are called the same."""

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
    *DTYPES,
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


def type_name(value: Any) -> str:
    """What a value is, for messages: "a list"."""
    if isinstance(value, Stored):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Object | Stranger | Global):
        return f"a Python object, {shown(value.name)}"
    if isinstance(value, Unread):
        return f"{value.what}, which optstate does not read"
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
