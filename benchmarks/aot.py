"""Compile every kernel of CUDA steps ahead of time, without a GPU, and print what the compiler made of each.

Registers per thread, bytes of spilled registers and of shared memory come from NVIDIA's assembler, by `cuobjdump`,
which Triton brings along. Spills would mean traffic to memory that no count of bytes knows of: there must be none.

    python -m benchmarks.aot [--arch 80 90 100] [--only NAME] [--turns] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from optstate.kernels.native import MomentKind, StepRule, WriteKind

ARCHITECTURES = (80, 90, 100)
"""A100; H100 and H200; B200."""

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: types of arguments by name, constants by name, and the number of warps."""

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant on one architecture; bytes of `spills` and `shared` memory.

    sums: how the elements of each sum lie in threads, which decides about the order of additions.
    """

    name: str
    kernel: str
    arch: int
    warps: int
    registers: int
    spills: int
    shared: int
    instructions: int
    sums: tuple[str, ...]

    @property
    def label(self) -> str:
        """The kernel and the variant."""
        return self.name if self.name.startswith(self.kernel) else f"{self.kernel}, {self.name}"


def of_weight(dtype: str, how: WriteKind) -> dict[str, str | None]:
    extra = {WriteKind.KAHAN: POINTERS[dtype], WriteKind.SPLIT16: "*i16", WriteKind.SPLIT8: "*i8"}
    return {"param": POINTERS[dtype], "grad": POINTERS[dtype], "extra": extra.get(how)}


def of_moment(name: str, kind: MomentKind) -> dict[str, str | None]:
    if kind == MomentKind.NOTHING:
        return dict.fromkeys((name, f"{name}_scale", f"{name}_table"))
    if kind in (MomentKind.FULL32, MomentKind.FULL16, MomentKind.FULL16_RANDOM):
        data = "*fp32" if kind == MomentKind.FULL32 else "*bf16"
        return {name: data, f"{name}_scale": None, f"{name}_table": None}
    if kind in (MomentKind.SPREAD, MomentKind.OUTER):
        return {name: "*fp32", f"{name}_scale": "*fp32" if kind == MomentKind.OUTER else None, f"{name}_table": None}
    return {name: "*u8", f"{name}_scale": "*fp32", f"{name}_table": "*fp32"}


LONG = ("start", "first_start", "second_start")
"""Counts of elements, which may need 64 bits."""

WHOLE = (
    "number",
    "row_count",
    "col_count",
    "programs",
    "weight_key",
    "first_key",
    "second_key",
    "second_block",
    "rows",
    "cols",
    "matrices",
    "strip",
)
"""Counts that fit 32 bits, and keys."""


def make_variant(
    name: str, kernel: str, arguments: list[str], given: dict[str, str | None], warps: int, **constants: Any
) -> Variant:
    """Return a variant whose other arguments have the types that a launch gives them."""
    types, fixed = {}, dict(constants)
    for argument in arguments:
        if argument in constants:
            continue
        usual = "i64" if argument in LONG else "i32" if argument in WHOLE else "fp32"
        kind = given.get(argument, usual)
        if kind is None:
            fixed[argument] = None
        else:
            types[argument] = kind
    return Variant(name, kernel, types, fixed, warps)


HOST = dict.fromkeys(("device_scale", "numbers", "clock"))
"""What only a device may know; here the host knows all."""


IN_TABLES = (
    "descent bf16 stochastic",
    "adam fp32",
    "adam bf16 stochastic",
    "adam bf16 kahan, bf16 moments",
    "adam bf16 split8",
    "adam 8-bit blocks",
    "adam 8-bit floats",
    "adam 4-bit blocks",
    "lion bf16",
)
"""Cases that are also compiled as steps of many parameters, whose tiles are those of single steps."""


def elementwise_variants() -> Iterator[Variant]:
    from optstate.kernels.triton_steps.elementwise import WARPS, WARPS_OF_CODES, elementwise_kernel
    from optstate.kernels.triton_steps.many import CHUNK
    from optstate.kernels.triton_steps.many_kernels import elementwise_table_kernel

    none, full, bf16 = MomentKind.NOTHING, MomentKind.FULL32, MomentKind.FULL16
    cases = [
        ("descent fp32", "float32", WriteKind.PLAIN, StepRule.DESCENT, none, none, 1),
        ("descent bf16 stochastic", "bfloat16", WriteKind.STOCHASTIC, StepRule.DESCENT, none, none, 1),
        ("descent fp16 stochastic", "float16", WriteKind.STOCHASTIC, StepRule.DESCENT, none, none, 1),
        ("adam fp32", "float32", WriteKind.PLAIN, StepRule.ADAM, full, full, 1),
        ("adam bf16 plain", "bfloat16", WriteKind.PLAIN, StepRule.ADAM, full, full, 1),
        ("adam bf16 stochastic", "bfloat16", WriteKind.STOCHASTIC, StepRule.ADAM, full, full, 1),
        ("adam fp16 stochastic", "float16", WriteKind.STOCHASTIC, StepRule.ADAM, full, full, 1),
        (
            "adam bf16 kahan, bf16 moments",
            "bfloat16",
            WriteKind.KAHAN,
            StepRule.ADAM,
            bf16,
            MomentKind.FULL16_RANDOM,
            1,
        ),
        ("adam bf16 split16", "bfloat16", WriteKind.SPLIT16, StepRule.ADAM, full, full, 1),
        ("adam bf16 split8", "bfloat16", WriteKind.SPLIT8, StepRule.ADAM, full, full, 1),
        (
            "adam 8-bit blocks",
            "bfloat16",
            WriteKind.STOCHASTIC,
            StepRule.ADAM,
            MomentKind.SIGNED8,
            MomentKind.UNSIGNED8,
            256,
        ),
        (
            "adam 8-bit floats",
            "bfloat16",
            WriteKind.STOCHASTIC,
            StepRule.ADAM,
            MomentKind.SIGNED_E4M3,
            MomentKind.UNSIGNED_E4M3,
            256,
        ),
        (
            "adam 4-bit blocks",
            "bfloat16",
            WriteKind.STOCHASTIC,
            StepRule.ADAM,
            MomentKind.SIGNED4,
            MomentKind.LINEAR4,
            128,
        ),
        ("adam group means", "bfloat16", WriteKind.STOCHASTIC, StepRule.ADAM, full, MomentKind.SPREAD, 1),
        ("adam factored", "bfloat16", WriteKind.STOCHASTIC, StepRule.ADAM, full, MomentKind.OUTER, 1),
        ("root of a sum", "bfloat16", WriteKind.STOCHASTIC, StepRule.ROOT_OF_SUM, none, full, 1),
        ("lion bf16", "bfloat16", WriteKind.STOCHASTIC, StepRule.LION, bf16, none, 1),
        ("lion 8-bit blocks", "bfloat16", WriteKind.STOCHASTIC, StepRule.LION, MomentKind.SIGNED8, none, 256),
        ("average bf16", "bfloat16", WriteKind.STOCHASTIC, StepRule.AVERAGE, full, none, 1),
        ("heavy ball fp32", "float32", WriteKind.PLAIN, StepRule.HEAVY_BALL, full, none, 1),
        (
            "heavy ball 8-bit blocks",
            "bfloat16",
            WriteKind.STOCHASTIC,
            StepRule.HEAVY_BALL,
            MomentKind.SIGNED8,
            none,
            256,
        ),
    ]
    for name, dtype, how, rule, first, second, block in cases:
        moved = second not in (none, MomentKind.SPREAD, MomentKind.OUTER)
        given = {**of_weight(dtype, how), **of_moment("first", first), **of_moment("second", second)}
        warps = WARPS if block == 1 else WARPS_OF_CODES
        constants = {
            "HOW": int(how),
            "RULE": int(rule),
            "NESTEROV": False,
            "FIRST": int(first),
            "SECOND": int(second),
            "FIRST_BLOCK": block,
            "SECOND_BLOCK": block if moved else 1,
            "CLAMPS": False,
            "PENALISES": False,
            "TILE": 1024,
        }
        single = {**given, **HOST, "finite": "*u8"}
        arguments = elementwise_kernel.arg_names
        yield make_variant(name, "elementwise", arguments, single, warps, **constants, MOVES_SECOND=moved)
        if name in IN_TABLES:
            yield table_variant(name, elementwise_table_kernel, given, warps, **constants, CHUNK=CHUNK)
    for name in ("adam bf16 stochastic", "adam 8-bit blocks"):  # the step is known to the device alone
        _, dtype, how, rule, first, second, block = next(case for case in cases if case[0] == name)
        given = {**of_weight(dtype, how), **of_moment("first", first), **of_moment("second", second)}
        known = {**given, "device_scale": "*fp32", "numbers": "*fp32", "clock": "*i64"}
        yield table_variant(
            f"{name}, device's clock",
            elementwise_table_kernel,
            known,
            WARPS if block == 1 else WARPS_OF_CODES,
            HOW=int(how),
            RULE=int(rule),
            NESTEROV=False,
            FIRST=int(first),
            SECOND=int(second),
            FIRST_BLOCK=block,
            SECOND_BLOCK=block,
            CLAMPS=False,
            PENALISES=False,
            TILE=1024,
            CHUNK=CHUNK,
        )


def table_variant(
    name: str, kernel: Any, given: dict[str, str | None], warps: int, whole: bool = True, **constants: Any
) -> Variant:
    """Return a variant of a kernel that finds its tensors in a table, where these would be its arguments.

    whole: whether all counts are multiples of 16.
    """
    import triton.language as tl

    words = {
        "fp32": tl.float32,
        "bf16": tl.bfloat16,
        "fp16": tl.float16,
        "u8": tl.uint8,
        "i8": tl.int8,
        "i16": tl.int16,
    }
    tensors = {
        "PARAM_TYPE": "param",
        "EXTRA_TYPE": "extra",
        "GRAD_TYPE": "grad",
        "FIRST_TYPE": "first",
        "FIRST_SCALE_TYPE": "first_scale",
        "SECOND_TYPE": "second",
        "SECOND_SCALE_TYPE": "second_scale",
    }
    for constant, tensor in tensors.items():
        kind = given.get(tensor)
        if constant in kernel.arg_names:
            constants[constant] = None if kind is None else words[kind.removeprefix("*")]
    tables = {name: given[name] for name in ("first_table", "second_table") if name in kernel.arg_names}
    device = {name: given.get(name) for name in HOST if name in kernel.arg_names}
    found = {**tables, **device, "rows": "*i64", "chunks": "*i32", "flags": "*u8"}
    found |= dict.fromkeys(("of_updates", "of_weights"), "*fp32")
    return make_variant(
        name, kernel.__name__.removesuffix("_kernel"), kernel.arg_names, found, warps, WHOLE=whole, **constants
    )


def finite_variants() -> Iterator[Variant]:
    from optstate.kernels.triton_steps.finite import CHECKED, finite_kernel
    from optstate.kernels.triton_steps.many import CHUNK
    from optstate.kernels.triton_steps.many_kernels import check_table_kernel

    for dtype in POINTERS:
        given: dict[str, str | None] = {"grad": POINTERS[dtype], "finite": "*u8", "count": "i32"}
        yield make_variant(f"finite {dtype}", "finite", finite_kernel.arg_names, given, 4, TILE=CHECKED)
    yield table_variant("bf16", check_table_kernel, of_weight("bfloat16", WriteKind.PLAIN), 4, CHUNK=CHUNK, TILE=1024)


SCRATCH = (
    "row",
    "col",
    "row_parts",
    "col_parts",
    "new_row",
    "new_col",
    "row_roots",
    "col_roots",
    "row_means",
    "squares",
    "of_updates",
    "of_weights",
    "average",
)
"""Statistics and sums, all fp32."""


def matrix_variants() -> Iterator[Variant]:
    from optstate.kernels.triton_steps import factored, many_kernels, unfactored

    def variant(name: str, given: dict[str, str | None], **constants: Any) -> Variant:
        kernel = find_kernel(name.split(",")[0])
        given = {**dict.fromkeys(SCRATCH, "*fp32"), "finite": "*u8", **HOST, **given}
        wide = ("measure", "apply_factored", "average_updates", "maxima")
        warps = factored.WIDE_WARPS if name.startswith(wide) else factored.WARPS
        warps = unfactored.APPLY_WARPS if name.startswith("apply_full") else warps
        return make_variant(name, name.split(",")[0], kernel.arg_names, given, warps, **constants)

    tile = {"HEIGHT": 16, "WIDTH": 256}
    for dtype in ("float32", "bfloat16"):
        yield variant(f"sum_squares, {dtype}", {"grad": POINTERS[dtype]}, CLAMPS=False, **tile)
    yield variant("move_factored", {"count": "i32"}, SIZE=factored.VECTOR)
    cases = [
        ("fp32", "float32", WriteKind.PLAIN, MomentKind.NOTHING),
        ("bf16 stochastic", "bfloat16", WriteKind.STOCHASTIC, MomentKind.NOTHING),
        ("fp16 stochastic", "float16", WriteKind.STOCHASTIC, MomentKind.NOTHING),
        ("bf16 kahan", "bfloat16", WriteKind.KAHAN, MomentKind.NOTHING),
        ("bf16 split16", "bfloat16", WriteKind.SPLIT16, MomentKind.NOTHING),
        ("bf16 split8", "bfloat16", WriteKind.SPLIT8, MomentKind.NOTHING),
        ("bf16 stochastic, fp32 momentum", "bfloat16", WriteKind.STOCHASTIC, MomentKind.FULL32),
        ("bf16 stochastic, bf16 momentum", "bfloat16", WriteKind.STOCHASTIC, MomentKind.FULL16_RANDOM),
    ]
    sums = {"OF_UPDATE": True, "OF_WEIGHT": True}
    of_vector = {"PROGRAMS": unfactored.MEASURING, "TILE": unfactored.TILE}
    for name, dtype, how, first in cases:
        given = {**of_weight(dtype, how), **of_moment("first", first), "second": "*fp32"}
        own = {"HOW": int(how), "CLAMPS": False}
        written = {**own, **sums, "FIRST": int(first), "DECAY_IS_SCALED": True, "PROGRAMS": 1024}
        if first == MomentKind.NOTHING:
            blocks = {"BLOCKS": 16, "ROW_BLOCK": factored.VECTOR}
            yield variant(f"measure, {name}", given, **own, **sums, **blocks, **tile)
            yield variant(f"move_full, {name}", {**given, "count": "i32"}, **own, OF_WEIGHT=True, TILE=unfactored.TILE)
            table = many_kernels.move_full_table_kernel
            if how in (WriteKind.PLAIN, WriteKind.SPLIT8):
                yield table_variant(
                    name, table, given, unfactored.MOVE_WARPS, **own, OF_WEIGHT=True, TILE=unfactored.TILE
                )
        yield variant(f"apply_factored, {name}", given, **written, BLOCKS=16, ROW_BLOCK=factored.VECTOR, **tile)
        yield variant(f"apply_full, {name}", {**given, "count": "i32"}, **(written | of_vector))
        table = many_kernels.apply_full_table_kernel
        if how in (WriteKind.PLAIN, WriteKind.SPLIT8) or first != MomentKind.NOTHING:
            yield table_variant(name, table, given, unfactored.APPLY_WARPS, **(written | of_vector))
            yield variant(f"maxima, {name}", given, HOW=int(how), FIRST=int(first), HEIGHT=8, WIDTH=256)
    for dtype in ("float32", "bfloat16"):
        constants = {"CLAMPS": False, "OF_UPDATE": True, "PROGRAMS": 1024, "BLOCKS": 16, "ROW_BLOCK": factored.VECTOR}
        yield variant(f"average_updates, {dtype}", {"grad": POINTERS[dtype]}, **constants, **tile)
    yield variant("finish_maxima", {}, SIZE=factored.VECTOR)


def all_variants() -> list[Variant]:
    """Return every kernel in its main variants."""
    return [*elementwise_variants(), *finite_variants(), *matrix_variants()]


def find_kernel(name: str) -> Any:
    """Return a kernel by its name without "_kernel"."""
    from optstate.kernels.triton_steps import (
        confidence,
        elementwise,
        factored_kernels,
        finite,
        many_kernels,
        maxima,
        unfactored,
    )

    homes = (elementwise, finite, factored_kernels, unfactored, confidence, maxima, many_kernels)
    return next(getattr(home, f"{name}_kernel") for home in homes if hasattr(home, f"{name}_kernel"))


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """Compile one variant for one architecture."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from optstate.kernels.triton_steps.launching import OPTIONS

    kernel = find_kernel(variant.kernel)
    signature = {name: variant.types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in variant.constants.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name in ("count", "rows", "cols"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": variant.warps, **OPTIONS})
    registers, spills = read_usage(made.asm["cubin"])
    instructions = len(re.findall(r"^\t(?!\.)[@a-z]", made.asm["ptx"], re.M))
    shared, sums = made.metadata.shared, read_sums(made.asm["ttgir"])
    return Compiled(variant.name, variant.kernel, arch, variant.warps, registers, spills, shared, instructions, sums)


def read_sums(code: str) -> tuple[str, ...]:
    """Return how the elements of each sum in a kernel lie in threads, from the compiler's own representation."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.(.*)$", code, re.M))
    of_sums = re.findall(r'"tt\.reduce".*?\}\) : \(tensor<([\dx]+)\w+, (?:#ttg\.slice<.*?parent = )?(#\w+)', code, re.S)
    return tuple(f"{shape} {layouts[layout]}" for shape, layout in of_sums)


def read_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers per thread, and bytes of local memory per thread, of the kernel in a binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text}")
    return int(found[1]), max(int(found[2]), int(found[3]))


def format_table(rows: list[Compiled]) -> str:
    names: dict[str, dict[int, Compiled]] = {}
    for row in rows:
        names.setdefault(row.label, {})[row.arch] = row
    architectures = sorted({row.arch for row in rows})
    lines = [f"{'kernel':48}{'warps':>6}  " + "  ".join(f"sm_{arch}: regs spill shared" for arch in architectures)]
    for name, each in names.items():
        columns = [
            f"{'':4}{r.registers:9}{r.spills:6}{r.shared:7}" if (r := each.get(arch)) else " " * 26
            for arch in architectures
        ]
        lines.append(f"{name:48}{next(iter(each.values())).warps:6}  {'  '.join(columns)}".rstrip())
    return "\n".join(lines)


def take_turns(variants: list[Variant], architectures: Sequence[int]) -> Iterator[tuple[Variant, int]]:
    """Yield every variant with one architecture, by turns, and with more where a kernel lacks one of them."""
    turns: dict[str, list[Variant]] = {}
    for variant in variants:
        turns.setdefault(variant.kernel, []).append(variant)
    for each in turns.values():
        for i in range(max(len(each), len(architectures))):
            yield each[i % len(each)], architectures[i % len(architectures)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="a part of the names")
    parser.add_argument("--turns", action="store_true", help="every variant for one of them, every kernel for all")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing is taken from an earlier run
        chosen = [variant for variant in all_variants() if options.only in f"{variant.kernel} {variant.name}"]
        pairs = take_turns(chosen, options.arch) if options.turns else product(chosen, options.arch)
        rows = [compile_variant(variant, arch) for variant, arch in pairs]
    import triton

    print(f"triton {triton.__version__}, no fused multiplications and additions; spills and shared memory in bytes\n")
    print(format_table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
