"""Models known by the headers of their safetensors files: shapes and dtypes, nothing that could be run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from optstate.checkpoint.document.document import KEY
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import FLOATS
from optstate.checkpoint.files.safetensors_header import Entry, Header, read_header
from optstate.checkpoint.files.safetensors_index import read_index
from optstate.checkpoint.formats.lerobot import is_lerobot
from optstate.memory.errors import SourceError
from optstate.memory.model import Model, ParamShape
from optstate.text import shown

__all__ = ["INDEX", "of_headers", "weights_at"]

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"

DTYPES = {name: torch_name for torch_name, name in FLOATS.items()}

BUFFER = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked|inv_freq|masked_bias|position_ids|token_type_ids)$"
)
"""Names of buffers in torch's and transformers' modules."""

MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
"""Names of the causal mask that old models keep, which has four dimensions, or of the bias of a projection."""

PACKED = re.compile(
    r"(^|\.)(qweight|qzeros|g_idx|scales|SCB|weight_scale|weight_scale_inv|weight_packed|weight_scale_2)$"
    r"|\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$"
)
ADAPTER = re.compile(r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\.|$)")


def weights_at(path: Path) -> list[Header]:
    """Read the headers of a file, of a sharded set by its index, or of a folder with one of these.

    None are returned if there is only the state of an optimizer, or no safetensors file at all.

    Raises:
        SourceError: if a file cannot be read, or the folder holds several models.
    """
    try:
        if not path.is_dir():
            return _weights(path)
        found = {part: headers for part in _parts(path) if (headers := _weights(part))}
    except CheckpointError as error:
        raise SourceError(str(error)) from error
    if len(found) > 1:
        files = ", ".join(f"'{shown(part.name)}'" for part in list(found)[:8])
        raise SourceError(f"{shown(str(path))}: it holds {len(found)} models: {files}; give one of them")
    return next(iter(found.values()), [])


def _parts(path: Path) -> list[Path]:
    """Return the indices in a folder, or else its safetensors files."""
    names = sorted(part.name for part in path.iterdir())
    indices = [name for name in names if name.endswith(INDEX)]
    return [path / name for name in indices or [name for name in names if name.endswith(SUFFIX)]]


def _weights(path: Path) -> list[Header]:
    """Read the headers of a file or set that is not the state of an optimizer, ours or LeRobot's."""
    headers = list(read_index(path).shards.values()) if path.name.endswith(INDEX) else [read_header(path)]
    return [] if any(KEY in header.metadata or is_lerobot(header) for header in headers) else headers


def of_headers(path: Path, headers: Iterable[Header], dtype: str) -> Model:
    """Describe the model that these files hold the weights of: dtypes are the file's.

    dtype: the one asked for; a note says where the file's is another.

    Raises:
        SourceError: for adapters without their model, for quantised weights, and for files without any.
    """
    entries = [entry for header in headers for entry in header.tensors]
    where = shown(str(path))
    _refuse_adapters(where, entries)
    _refuse_packed(where, entries)
    buffers = [entry for entry in entries if _is_buffer(entry)]
    params = [ParamShape(e.name, e.shape, DTYPES[e.dtype]) for e in entries if not _is_buffer(e)]
    if not params:
        raise SourceError(f"{where}: no weights among its {len(entries)} tensors")
    return Model(
        name=path.name,
        parameters=tuple(params),
        origin=f"{path}, headers of {len(entries)} tensors, torch {torch.__version__}",
        buffer_bytes=sum(entry.nbytes for entry in buffers),
        notes=_notes(params, buffers, dtype),
    )


def _is_buffer(entry: Entry) -> bool:
    mask = MASK.search(entry.name) is not None and len(entry.shape) == 4
    return entry.dtype not in DTYPES or mask or BUFFER.search(entry.name) is not None


def _refuse_adapters(where: str, entries: Iterable[Entry]) -> None:
    found = next((entry for entry in entries if ADAPTER.search(entry.name)), None)
    if found is not None:
        reason = f"weights of an adapter ('{shown(found.name)}'): the model it belongs to is not in the file"
        raise SourceError(f"{where}: {reason}; give package.module:factory that makes both")


def _refuse_packed(where: str, entries: Iterable[Entry]) -> None:
    """Codes of quantised weights have another shape than what they stand for, and do not train."""
    for entry in entries:
        eight = entry.dtype.startswith("F") and entry.dtype not in DTYPES
        matrix = entry.dtype in ("U8", "I8") and len(entry.shape) >= 2 and entry.name.endswith("weight")
        if PACKED.search(entry.name) or eight or matrix:
            reason = f"quantised weights ('{shown(entry.name)}', {entry.dtype}), which are not trained"
            raise SourceError(f"{where}: {reason}; give the config.json or the files of the unquantised model")


def _notes(params: list[ParamShape], buffers: list[Entry], dtype: str) -> tuple[str, ...]:
    notes = ["activations are not estimated: headers say only shapes; give its config.json for them"]
    if buffers:
        names = ", ".join(f"'{shown(entry.name)}'" for entry in buffers[:3]) + (" ..." if len(buffers) > 3 else "")
        notes.append(f"taken for buffers, not parameters: {names}")
    others = sorted({param.dtype for param in params} - {dtype})
    if others:
        notes.append(f"weights are {', '.join(others)}, as in the file, not {dtype}")
    return tuple(notes)
