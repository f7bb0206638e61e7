# SPDX-License-Identifier: Apache-2.0
"""The PTX interpreter (tests/ptxsim) for Python tests: one Simulator per test, as a context.

Leaving the context fails on findings that the test did not take, restores the settings and forgets
the registered ranges. The library stands in for the CUDA runtime of the shipped kernels; it must be
loaded before them, which `load()` does.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
# Registers that bodies may use besides their inputs and outputs.
SCRATCH = (
    ".reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %t<64>; .reg .b64 %l<16>; .reg .f32 %f<16>;"
)
NAMES = "abcefg"  # inputs of lanes(); its outputs are %d, %d1, ...


def library_path() -> Path:
    """MMQ_PTXSIM_LIBRARY, or where the build with -DMMQ_PTXSIM=ON puts it."""
    return Path(os.environ.get("MMQ_PTXSIM_LIBRARY", ROOT / "build/ptxsim/libptxsim.so"))


def available() -> bool:
    return library_path().exists()


needs_simulator = pytest.mark.skipif(
    not available() and "ptxsim" not in os.environ.get("MMQ_REQUIRE", ""),
    reason="the PTX interpreter is not built (cmake -DMMQ_PTXSIM=ON)",
)


@functools.cache
def load() -> ctypes.CDLL:
    """Loads the library with its symbols visible, so that kernels loaded later bind to it."""
    library = ctypes.CDLL(str(library_path()), ctypes.RTLD_GLOBAL)
    pointer, size, text = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "run_ptx": (ctypes.c_int, [text, text, pointer, pointer, size, pointer, ctypes.c_int]),
        "check_ptx": (ctypes.c_int, [text]),
        "fatbin_images": (ctypes.c_int, [pointer]),
        "allocate": (pointer, [size]),
        "release": (ctypes.c_int, [pointer]),
        "register": (ctypes.c_int, [pointer, size, text, ctypes.c_int]),
        "unregister": (ctypes.c_int, [pointer]),
        "mark_defined": (ctypes.c_int, [pointer, size, ctypes.c_int]),
        "declare_zero": (ctypes.c_int, [pointer, size, text]),
        "forget_zero": (ctypes.c_int, [pointer]),
        "configure": (ctypes.c_int, [text, text]),
        "reset_config": (None, []),
        "report_json": (text, []),
        "findings_json": (text, []),
        "report_table": (text, []),
        "last_error": (text, []),
        "clear": (None, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"ptxsim_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class SimulatorError(RuntimeError):
    """A call that the interpreter refused, with its reason."""


@dataclass(frozen=True)
class Finding:
    """One distinct finding of a check."""

    kind: str
    kernel: str
    file: str
    line: int
    message: str
    block: tuple[int, int, int]
    warp: int
    lane: int
    count: int

    def __str__(self) -> str:
        return f"{self.kind} at {self.file}:{self.line} in {self.kernel}: {self.message}"


class Simulator:
    """The simulated device, with settings for the time of a test: Simulator(capability=86)."""

    def __init__(self, **settings: object) -> None:
        self._library = load()
        self._settings = settings
        self._ranges: dict[int, object] = {}  # keeps registered memory alive

    def __enter__(self) -> Simulator:
        self._library.ptxsim_clear()
        self._library.ptxsim_reset_config()
        for key, value in self._settings.items():
            self.configure(key, value)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        found = self.findings()
        for pointer in list(self._ranges):
            self.unregister(pointer)
        self._library.ptxsim_reset_config()
        self._library.ptxsim_clear()
        if kind is None and found:
            raise AssertionError("findings:\n" + "\n".join(map(str, found)))

    def _check(self, status: int) -> None:
        if status < 0:
            raise SimulatorError(self.last_error())

    def last_error(self) -> str:
        """Why the last call, or the last launch through the stand-in runtime, was refused."""
        return str(self._library.ptxsim_last_error().decode())

    def configure(self, key: str, value: object) -> None:
        text = str(int(value)) if isinstance(value, bool) else str(value)
        self._check(self._library.ptxsim_configure(key.encode(), text.encode()))

    def register(self, memory: Any, name: str, *, defined: bool = True) -> int:
        """Makes an array or a CPU tensor device memory; its address."""
        pointer, size = _extent(memory)
        if size > 0:
            self._check(self._library.ptxsim_register(pointer, size, name.encode(), int(defined)))
            self._ranges[pointer] = memory
        return pointer

    def unregister(self, memory: Any) -> None:
        pointer = memory if isinstance(memory, int) else _extent(memory)[0]
        if self._ranges.pop(pointer, None) is not None:
            self._check(self._library.ptxsim_unregister(pointer))

    def mark_defined(self, memory: Any, *, defined: bool = True) -> None:
        self._check(self._library.ptxsim_mark_defined(*_extent(memory), int(defined)))

    def declare_zero(self, memory: Any, name: str) -> None:
        """A registered range that must hold zeros after every launch, else it is a leftover."""
        self._check(self._library.ptxsim_declare_zero(*_extent(memory), name.encode()))

    def check_ptx(self, ptx: str) -> None:
        self._check(self._library.ptxsim_check_ptx(ptx.encode()))

    def run_ptx(
        self,
        ptx: str,
        params: Sequence[Any],
        *,
        grid: tuple[int, ...] = (1,),
        block: tuple[int, ...] = (32,),
        shared_bytes: int = 0,
        kernel: str = "test",
        defined: Sequence[bool] | None = None,
    ) -> None:
        """Runs one kernel. Arrays are passed by address, registered for the time of the call (if
        they are not yet) under the names p0, p1, ...; numpy scalars by value."""
        if os.environ.get("MMQ_PTXAS"):
            assemble(ptx)
        values, mine = [], []
        try:
            for i, param in enumerate(params):
                if isinstance(param, np.generic):
                    values.append(np.array([param]))
                    continue
                pointer = _extent(param)[0]
                if pointer not in self._ranges:
                    self.register(param, f"p{i}", defined=defined is None or defined[i])
                    mine.append(pointer)
                values.append(np.array([pointer], dtype=np.uint64))
            addresses = (ctypes.c_void_p * max(len(values), 1))(*[v.ctypes.data for v in values])
            self._check(
                self._library.ptxsim_run_ptx(
                    ptx.encode(),
                    kernel.encode(),
                    _dims(grid),
                    _dims(block),
                    shared_bytes,
                    addresses,
                    len(values),
                )
            )
        finally:
            for pointer in mine:
                self.unregister(pointer)

    def report(self) -> dict[str, Any]:
        """{"findings": [...], "launches": [...]} since the last clear."""
        return dict(json.loads(self._library.ptxsim_report_json()))

    def table(self) -> str:
        return str(self._library.ptxsim_report_table().decode())

    def findings(self) -> list[Finding]:
        return [
            Finding(**{**fields, "block": tuple(fields["block"])})
            for fields in json.loads(self._library.ptxsim_findings_json())["findings"]
        ]

    def launches(self) -> list[dict[str, Any]]:
        return list(self.report()["launches"])

    def clear(self) -> None:
        """Forgets findings, launches and errors."""
        self._library.ptxsim_clear()

    def take(self, kind: str) -> list[Finding]:
        """The findings, all of which must be of this kind; forgets them."""
        found = self.findings()
        assert found, f"expected a finding of kind {kind}, got none"
        others = [str(finding) for finding in found if finding.kind != kind]
        assert not others, f"expected findings of kind {kind} only, got {others}"
        self.clear()
        return found


@functools.cache
def assemble(ptx: str) -> None:
    """Fails unless NVIDIA's assembler takes the text too: the tests' own PTX must be legal. Asked
    for by MMQ_PTXAS=1."""
    target = ptx.split(".target")[1].split()[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = ["ptxas", f"-arch={target}", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\n{ptx}"


def _extent(memory: Any) -> tuple[int, int]:
    """Address and bytes of an array or a tensor, which must be contiguous."""
    if isinstance(memory, np.ndarray):
        assert memory.flags.c_contiguous, "expected a contiguous array"
        return memory.ctypes.data, memory.nbytes
    assert memory.is_contiguous(), "expected a contiguous tensor"
    return memory.data_ptr(), memory.numel() * memory.element_size()


def _dims(size: tuple[int, ...]) -> Any:
    return (ctypes.c_uint32 * 3)(*size, *[1] * (3 - len(size)))


# --- helpers that write PTX ---------------------------------------------------------------------


def kernel(
    body: str,
    params: Sequence[str],
    *,
    prologue: str = "",
    target: str = "sm_80",
    directives: str = "",
) -> str:
    """A module with one kernel `test`; `params` are types such as "u64", found in %q0, %q1, ..."""
    declared = ", ".join(f".param .{kind} test_p{i}" for i, kind in enumerate(params))
    loads = "\n".join(
        f".reg .b{kind[1:]} %q{i}; ld.param.{kind} %q{i}, [test_p{i}];"
        for i, kind in enumerate(params)
    )
    header = HEADER.replace("sm_80", target)
    return (
        f"{header}{prologue}\n.visible .entry test({declared})\n{directives}\n{{\n"
        f"{SCRATCH}\n{loads}\n{body}\nret;\n}}\n"
    )


THREAD_INDEX = """
.reg .b32 %index, %block, %threads; .reg .b64 %wide;
mov.u32 %block, %ctaid.x; mov.u32 %threads, %ntid.x; mov.u32 %index, %tid.x;
mad.lo.u32 %index, %block, %threads, %index;
"""


def _move(direction: str, parameter: int, registers: Sequence[str], dtype: np.dtype[Any]) -> str:
    """Loads or stores a lane's row of values, one element at a time."""
    size = dtype.itemsize
    lines = [
        f"mul.wide.u32 %wide, %index, {size * len(registers)};",
        f"add.u64 %wide, %q{parameter}, %wide;",
    ]
    for i, register in enumerate(registers):
        address = f"[%wide+{i * size}]"
        operands = f"{register}, {address}" if direction == "ld" else f"{address}, {register}"
        lines.append(f"{direction}.global.b{8 * size} {operands};")
    return "\n".join(lines)


def _declare(registers: Sequence[str], dtype: np.dtype[Any]) -> str:
    # A byte lives in a 16-bit register, as PTX demands.
    kind = f"f{8 * dtype.itemsize}" if dtype in (np.float32, np.float64) else "b16"
    if dtype.itemsize > 2 and kind == "b16":
        kind = f"b{8 * dtype.itemsize}"
    return f".reg .{kind} {', '.join(registers)};"


def lanes(
    simulator: Simulator,
    body: str,
    inputs: Sequence[np.ndarray[Any, Any]],
    outputs: Sequence[tuple[Any, int]] | Any,
    *,
    block: int = 128,
    prologue: str = "",
    target: str = "sm_80",
) -> Any:
    """Runs `body` once per lane.

    Input j is in the register %a, %b, %c, %e, ... of the lane; a row of a two-dimensional input in
    %a0, %a1, ... An output is a dtype, in %d, or several in a list, in %d, %d1, ...; (dtype, count)
    means registers %d0, %d1, ... of one output with a row per lane.
    """
    count = len(inputs[0])
    rows = outputs if isinstance(outputs, list) else [outputs]
    results: list[np.ndarray[Any, Any]] = []
    before, after, params = [], [], []
    for j, values in enumerate(inputs):
        assert len(values) == count
        names = [f"%{NAMES[j]}"]
        if values.ndim == 2:
            names = [f"%{NAMES[j]}{i}" for i in range(values.shape[1])]
        before += [_declare(names, values.dtype), _move("ld", j, names, values.dtype)]
        params.append(np.ascontiguousarray(values))
    for j, row in enumerate(rows):
        dtype, width = row if isinstance(row, tuple) else (row, 0)
        names = [f"%d{i}" for i in range(width)] if width else [f"%d{j}" if j else "%d"]
        before.append(_declare(names, np.dtype(dtype)))
        after.append(_move("st", len(inputs) + j, names, np.dtype(dtype)))
        results.append(np.zeros((count, width) if width else count, dtype=dtype))
    block = min(block, count)
    if count % block:
        before.insert(0, f"setp.ge.u32 %p7, %index, {count}; @%p7 bra $done;")
        after.append("$done:")
    text = "\n".join([THREAD_INDEX, *before, body, *after])
    ptx = kernel(text, ["u64"] * (len(inputs) + len(rows)), prologue=prologue, target=target)
    simulator.run_ptx(
        ptx,
        [*params, *results],
        grid=(-(-count // block),),
        block=(block,),
    )
    return results if isinstance(outputs, list) else results[0]


def assert_bits(
    got: np.ndarray[Any, Any],
    want: np.ndarray[Any, Any],
    what: str = "",
    inputs: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> None:
    """Bitwise equality; NaNs of any payload are equal. The message lists the first mismatches."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, not {want.shape}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, not {want.dtype}"
    wrong = got != want
    if got.dtype.kind == "f":
        unsigned = f"u{got.dtype.itemsize}"
        wrong = (got.view(unsigned) != want.view(unsigned)) & ~(np.isnan(got) & np.isnan(want))
    if not wrong.any():
        return
    lines = [f"{what}: {int(wrong.sum())} of {wrong.size} differ"]
    for index in np.argwhere(wrong)[:5]:
        at = tuple(int(i) for i in index)
        given = ", ".join(f"{name}={values[at[0]]!r}" for name, values in (inputs or {}).items())
        lines.append(f"  {list(at)}: got {got[at]!r}, expected {want[at]!r} {given}")
    raise AssertionError("\n".join(lines))
