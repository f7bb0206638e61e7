# SPDX-License-Identifier: Apache-2.0
"""Other libraries' packed products as benchmark cases: ONNX Runtime, OpenVINO and ggml.

The first two are installed by `pip install -e .[bench]`, ggml as ggml.py says; one that is missing
is named and left out. Weights are random; their values do not change what a kernel does. Like ours,
every case holds enough copies of its weights to exceed the caches, each in a session of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import ggml
import numpy as np
import torch
from gemm_cases import Case, Maker, copies_beyond_cache

Run = Callable[[], Any]


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _in_turn(make: Callable[[], Run], weight_bytes: int, m: int) -> Run:
    turn = itertools.cycle([make() for _ in range(copies_beyond_cache(weight_bytes, m))])
    return lambda: next(turn)()


# --- ONNX Runtime: MatMulNBits ------------------------------------------------------------------


@functools.cache
def _onnxruntime_threads(threads: int) -> None:
    """One pool for all sessions: pools of their own would spin against each other."""
    import onnxruntime as ort

    ort.set_global_thread_pool_sizes(threads, 1)


def onnxruntime(m: int, k: int, n: int, *, group_size: int, bits: int, int8: bool) -> Case:
    """com.microsoft.MatMulNBits at 2, 4 or 8 bits, symmetric, fp32 scales; fp32 or int8 inside."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    group_size = k if group_size == -1 else group_size
    blocks = -(-k // group_size)
    rng = np.random.default_rng(0)
    _onnxruntime_threads(torch.get_num_threads())

    def make() -> Run:
        codes = rng.integers(0, 256, (n, blocks, group_size * bits // 8), dtype=np.uint8)
        scales = rng.random(n * blocks, dtype=np.float32)
        node = helper.make_node(
            *("MatMulNBits", ["x", "w", "s"], ["y"]),
            domain="com.microsoft",
            **{"K": k, "N": n, "bits": bits, "block_size": group_size},
            accuracy_level=4 if int8 else 1,
        )
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
            [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scales, "s")],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        x = rng.standard_normal((m, k), dtype=np.float32)
        return lambda: session.run(None, {"x": x})[0]

    size = n * k * bits // 8 + 4 * n * blocks
    name = f"ORT {'int8' if int8 else 'exact'} {bits}b"
    return Case(name, _in_turn(make, size, m), size)


# --- OpenVINO: a product with compressed weights ------------------------------------------------


def openvino(m: int, k: int, n: int, *, group_size: int, bits: int) -> Case:
    """Weights of 4 (i4) or 8 bits (u8), fp16 scales per group, products in fp32."""
    import openvino as ov
    from openvino import opset13 as op

    group_size = k if group_size == -1 else group_size
    kind = {4: ov.Type.i4, 8: ov.Type.u8}[bits]
    rng = np.random.default_rng(0)
    core = ov.Core()
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }

    def make() -> Run:
        shape = [n, k // group_size, group_size]
        raw = rng.integers(0, 256, n * k * bits // 8, dtype=np.uint8)
        codes = op.constant(ov.Tensor(raw, ov.Shape(shape), kind), shared_memory=False)
        w = op.convert(codes, "f16")
        if bits == 8:
            w = op.subtract(w, op.constant(np.full((n, shape[1], 1), 128, np.float16)))
        w = op.multiply(w, op.constant(rng.random((n, shape[1], 1)).astype(np.float16)))
        w = op.convert(op.reshape(w, op.constant([n, k]), False), "f32")
        x = op.parameter([m, k], ov.Type.f32)
        model = ov.Model([op.matmul(x, w, False, True)], [x])
        request = core.compile_model(model, "CPU", config).create_infer_request()
        request.set_input_tensor(ov.Tensor(rng.standard_normal((m, k), dtype=np.float32)))

        def run() -> Any:
            request.infer()
            return request.get_output_tensor().data

        return run

    size = n * k * bits // 8 + 2 * n * (k // group_size)
    return Case(f"OpenVINO {bits}b", _in_turn(make, size, m), size)


# --- ggml -----------------------------------------------------------------------------------------


def ggml_product(m: int, k: int, n: int, *, name: str) -> Case:
    """One of ggml's formats, with the groups that it has."""
    size = ggml.row_bytes(name, k) * n
    run = _in_turn(lambda: ggml.Product(name, m, k, n, torch.get_num_threads()).run, size, m)
    return Case(f"ggml {name}", run, size)


# --- which peers there are ------------------------------------------------------------------------


def _next_width(bits: int, widths: Sequence[int]) -> int:
    return min(width for width in widths if width >= bits)


def exact_peers(bits: int, group_size: int, k: int) -> list[Maker]:
    """Peers that multiply with fp32 activations, at this width or the next that they have."""
    width = _next_width(bits, (4, 8))
    found: list[Maker] = []
    if has("openvino") and (group_size == -1 or k % group_size == 0):
        found.append(Maker(openvino, group_size=group_size, bits=width))
    if has("onnxruntime") and has("onnx") and group_size in (32, 64, 128):
        found.append(Maker(onnxruntime, group_size=group_size, bits=width, int8=False))
    return found


def int8_peers(bits: int, group_size: int, k: int) -> list[Maker]:
    """Peers that quantize activations to 8 bits, at this width or the next that they have."""
    found: list[Maker] = []
    if has("onnxruntime") and has("onnx") and group_size in (32, 64, 128):
        width = _next_width(bits, (2, 4, 8))
        found.append(Maker(onnxruntime, group_size=group_size, bits=width, int8=True))
    if ggml.installed():
        names = next(f for b in range(bits, 9) if (f := ggml.formats(b, k)))
        found += [Maker(ggml_product, name=name) for name in names]
    return found


def missing() -> list[str]:
    absent = [p for p in ("onnxruntime", "onnx", "openvino") if not has(p)]
    return absent if ggml.installed() else [*absent, "llama-cpp-python"]
