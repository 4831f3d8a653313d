"""The dtypes and sizes of tensors in files: one table of what the formats call the dtypes. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "BITS",
    "DTYPES",
    "FLOATS",
    "FORMS",
    "MAX_COUNT",
    "MOST_DIMENSIONS",
    "SAFETENSORS_NAMES",
    "STORAGES",
    "STORAGE_CLASSES",
    "TORCH_NAMES",
]

MAX_COUNT = (1 << 63) - 1  # no framework counts further
MOST_DIMENSIONS = 1000  # torch counts to 64 in most places, the safetensors format has no limit


class Dtype(NamedTuple):
    """One dtype of the safetensors format.

    bits: of an element. torch, storage: what torch calls the dtype and the class of its storages; "" if there is none.
    form: the code of Python's `struct`, "" where that has none.
    """

    bits: int
    torch: str = ""
    storage: str = ""
    form: str = ""


DTYPES = {
    "BOOL": Dtype(8, "bool", "BoolStorage", "?"),
    "F4": Dtype(4),
    "F6_E2M3": Dtype(6),
    "F6_E3M2": Dtype(6),
    "U8": Dtype(8, "uint8", "ByteStorage", "B"),
    "I8": Dtype(8, "int8", "CharStorage", "b"),
    "F8_E5M2": Dtype(8, "float8_e5m2"),
    "F8_E4M3": Dtype(8, "float8_e4m3fn"),
    "F8_E8M0": Dtype(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": Dtype(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": Dtype(8, "float8_e5m2fnuz"),
    "I16": Dtype(16, "int16", "ShortStorage", "h"),
    "U16": Dtype(16, "uint16", "", "H"),
    "F16": Dtype(16, "float16", "HalfStorage", "e"),
    "BF16": Dtype(16, "bfloat16", "BFloat16Storage"),
    "I32": Dtype(32, "int32", "IntStorage", "i"),
    "U32": Dtype(32, "uint32", "", "I"),
    "F32": Dtype(32, "float32", "FloatStorage", "f"),
    "C64": Dtype(64, "complex64", "ComplexFloatStorage"),
    "F64": Dtype(64, "float64", "DoubleStorage", "d"),
    "I64": Dtype(64, "int64", "LongStorage", "q"),
    "U64": Dtype(64, "uint64", "", "Q"),
}
"""By the safetensors format's names, in the order of the library's own list: the writer sorts by it."""

BITS = {name: dtype.bits for name, dtype in DTYPES.items()}

TORCH_NAMES = {name: dtype.torch for name, dtype in DTYPES.items() if dtype.torch}

SAFETENSORS_NAMES = {f"torch.{torch_name}": name for name, torch_name in TORCH_NAMES.items()}
"""By what a pickle calls torch's dtypes, as "torch.bfloat16"."""

STORAGE_CLASSES = {name: dtype.storage for name, dtype in DTYPES.items() if dtype.storage}

STORAGES = {storage: name for name, storage in STORAGE_CLASSES.items()} | {"UntypedStorage": "U8"}
"""The dtypes of torch's storage classes; those of any device are called the same."""

FORMS = {name: dtype.form for name, dtype in DTYPES.items() if dtype.form}

FLOATS = {torch_name: name for name, torch_name in TORCH_NAMES.items() if name in ("F64", "F32", "F16", "BF16")}
"""The dtypes that parameters can have, by torch's names."""
