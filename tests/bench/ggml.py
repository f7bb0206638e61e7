# SPDX-License-Identifier: Apache-2.0
"""ggml's packed products as benchmark cases, through the libraries that llama-cpp-python builds.

`pip install llama-cpp-python` compiles ggml for this machine (some minutes); without it these peers
are named as missing and left out. MMQ_BENCH_GGML names the folder of another build's
libggml-base.so and libggml-cpu.so, such as one without AVX-512. Its products quantize activations
to 8 bits. Rows of weights are interleaved at load where ggml has kernels for that. Its K formats
need a K that is a multiple of 256, the others one of 32.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Pointer = ctypes.c_void_p
Size = ctypes.c_size_t


class Format(NamedTuple):
    """A type of ggml.h: its number there, the bits of a code, and what K must be a multiple of."""

    number: int
    bits: int
    multiple: int


F32 = 0
FORMATS = {
    "Q2_K": Format(10, 2, 256),
    "Q3_K": Format(11, 3, 256),
    "Q4_0": Format(2, 4, 32),
    "Q4_K": Format(12, 4, 256),
    "Q5_0": Format(6, 5, 32),
    "Q5_K": Format(13, 5, 256),
    "Q6_K": Format(14, 6, 256),
    "Q8_0": Format(8, 8, 32),
}


class _Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", Pointer),
        ("ne", ctypes.c_int64 * 4),
        ("nb", Size * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", Pointer * 10),
        ("view_src", Pointer),
        ("view_offs", Size),
        ("data", Pointer),
        ("name", ctypes.c_char * 64),
        ("extra", Pointer),
        ("padding", ctypes.c_char * 8),
    ]


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", Size), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool)]


_silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Pointer)(lambda *_: None)


def installed() -> bool:
    return "MMQ_BENCH_GGML" in os.environ or importlib.util.find_spec("llama_cpp") is not None


def formats(bits: int, k: int) -> list[str]:
    """Names of the formats of this width that fit K."""
    return [name for name, f in FORMATS.items() if f.bits == bits and k % f.multiple == 0]


@functools.cache
def _library() -> Callable[..., Any]:
    """`call(name, restype, *args)` on ggml's shared libraries; llama_cpp is not imported."""
    folder = Path(os.environ.get("MMQ_BENCH_GGML", ""))
    if not folder.name:
        spec = importlib.util.find_spec("llama_cpp")
        assert spec is not None
        folder = Path(spec.origin or "").parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))

    def call(name: str, restype: Any, *args: Any) -> Any:
        function = getattr(base if hasattr(base, name) else cpu, name)
        function.restype = restype
        return function(*args)

    # ggml reports every interleaved tensor on stderr.
    call("ggml_log_set", None, _silent, Pointer(None))
    return call


def row_bytes(name: str, k: int) -> int:
    """Bytes of one row of weights."""
    size: int = _library()("ggml_row_size", Size, FORMATS[name].number, ctypes.c_int64(k))
    return size


@functools.cache
def _interleaving_buffers() -> Pointer | None:
    """The CPU's buffer type that interleaves rows of weights, None if this build has none."""
    call = _library()
    registry = Pointer(call("ggml_backend_cpu_reg", Pointer))
    device = Pointer(call("ggml_backend_reg_dev_get", Pointer, registry, Size(0)))
    name = b"ggml_backend_dev_get_extra_bufts"
    address = call("ggml_backend_reg_get_proc_address", Pointer, registry, name)
    if address is None:
        return None
    get = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(address)
    for kind in itertools.takewhile(lambda kind: kind is not None, get(device)):
        if call("ggml_backend_buft_name", ctypes.c_char_p, Pointer(kind)) == b"CPU_REPACK":
            return Pointer(kind)
    return None


@functools.cache
def _rows(name: str, k: int) -> bytes:
    """A few quantized rows, which are repeated: what they hold does not change a kernel's time."""
    call, rows = _library(), 64
    x = np.random.default_rng(0).standard_normal((rows, k), dtype=np.float32)
    out = ctypes.create_string_buffer(row_bytes(name, k) * rows)
    address = x.ctypes.data_as(Pointer)
    counts = (ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(k))
    call("ggml_quantize_chunk", Size, FORMATS[name].number, address, out, *counts, None)
    return out.raw


def _free(
    call: Callable[..., Any], buffers: list[Pointer], contexts: list[Pointer], backend: Pointer
) -> None:
    for buffer in buffers:
        call("ggml_backend_buffer_free", None, buffer)
    for context in contexts:
        call("ggml_free", None, context)
    call("ggml_backend_free", None, backend)


class Product:
    """One weight matrix of ggml and the graph y = x W^T over it; `run` computes it."""

    def __init__(self, name: str, m: int, k: int, n: int, threads: int) -> None:
        self._call = call = _library()
        overhead = call("ggml_graph_overhead", Size)
        params = _InitParams(overhead + 16 * ctypes.sizeof(_Tensor) + 4096, None, True)
        self._backend = Pointer(call("ggml_backend_cpu_init", Pointer))
        call("ggml_backend_cpu_set_n_threads", None, self._backend, threads)
        weights, rest = (Pointer(call("ggml_init", Pointer, params)) for _ in range(2))

        def tensor(context: Pointer, kind: int, columns: int, rows: int) -> Pointer:
            sizes = (ctypes.c_int64(columns), ctypes.c_int64(rows))
            return Pointer(call("ggml_new_tensor_2d", Pointer, context, kind, *sizes))

        w = tensor(weights, FORMATS[name].number, k, n)
        buffers = [self._allocate(weights, w)]
        data = _rows(name, k)
        size = call("ggml_nbytes", Size, w)
        data = (data * -(-size // len(data)))[:size]
        call("ggml_backend_tensor_set", None, w, data, Size(0), Size(size))
        x = tensor(rest, F32, k, m)
        self._y = Pointer(call("ggml_mul_mat", Pointer, rest, w, x))
        self._graph = Pointer(call("ggml_new_graph", Pointer, rest))
        call("ggml_build_forward_expand", None, self._graph, self._y)
        buffers.append(
            Pointer(call("ggml_backend_alloc_ctx_tensors", Pointer, rest, self._backend))
        )
        weakref.finalize(self, _free, call, buffers, [weights, rest], self._backend)
        values = torch.randn(m, k).numpy().tobytes()
        call("ggml_backend_tensor_set", None, x, values, Size(0), Size(len(values)))
        self.bytes = size
        self._shape = (m, n)

    def _allocate(self, context: Pointer, w: Pointer) -> Pointer:
        """A buffer for w: in the interleaved layout if ggml has kernels for it, else plain."""
        allocate = "ggml_backend_alloc_ctx_tensors_from_buft"
        kind = _interleaving_buffers()
        fields = ctypes.cast(w, ctypes.POINTER(_Tensor)).contents
        if kind is not None:
            buffer = Pointer(self._call(allocate, Pointer, context, kind))
            if fields.extra is not None:
                self.interleaved = True
                return buffer
            fields.buffer = fields.data = None
            self._call("ggml_backend_buffer_free", None, buffer)
        plain = Pointer(self._call("ggml_backend_cpu_buffer_type", Pointer))
        self.interleaved = False
        return Pointer(self._call(allocate, Pointer, context, plain))

    def run(self) -> None:
        status = self._call("ggml_backend_graph_compute", ctypes.c_int, self._backend, self._graph)
        if status != 0:
            raise RuntimeError(f"ggml: expected status 0, got {status}")

    def result(self) -> np.ndarray[Any, Any]:
        m, n = self._shape
        y = np.empty((m, n), np.float32)
        address = y.ctypes.data_as(Pointer)
        self._call("ggml_backend_tensor_get", None, self._y, address, Size(0), Size(y.nbytes))
        return y
