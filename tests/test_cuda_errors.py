# SPDX-License-Identifier: Apache-2.0
"""What a user without a usable CUDA reads: one clear error each, and a process that goes on."""

import ctypes.util
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from isas import needs_cuda
from shapes import problem
from simulated import BorrowedGpu, cuda_kernels, on_gpu, simulated_cuda

import mmq_ext
from mmq.device import check_cuda, check_kernels, device_of, find_device
from mmq.errors import MmqError
from mmq.linear import QuantLinear
from mmq.quantize import quantize
from mmq.recipe import Recipe
from mmq.spec import QuantSpec
from mmq_ext import _C, cuda_ops, ops
from mmq_ext.device import ask, check_one_device, on_cuda, use_device

# Calls that need the library, then proves that the process still multiplies.
TRY = """
import torch, mmq_ext
from mmq_ext import _C, cuda_ops, ops
def mapped():
    return [line.split()[-1] for line in open("/proc/self/maps") if "libmmq_cuda" in line]
assert not mapped(), mapped()
for call in (mmq_ext.cuda_status, lambda: _C.cuda_pack(64, 128, 1, 8, 4, 0)):
    try:
        print(call())
    except Exception as error:
        print(type(error).__name__, error)
codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
assert torch.equal(ops.unpack(ops.pack(codes, 4), 4, 8), codes)
print("usable")
"""


def try_library(path: str | None) -> list[str]:
    """The lines that TRY prints in a process of its own: status, pack, "usable"."""
    env = {name: value for name, value in os.environ.items() if name != "MMQ_CUDA_LIBRARY"}
    if path is not None:
        env["MMQ_CUDA_LIBRARY"] = path
    done = subprocess.run(
        [sys.executable, "-c", TRY],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "usable"
    return lines[:-1]


def test_a_build_without_the_kernels_says_how_to_build_them(tmp_path):
    path = tmp_path / "libmmq_cuda.so"
    for line in try_library(str(path)):
        assert line.startswith(f"RuntimeError cuda: expected the CUDA kernels in {path}")
        assert "-DMMQ_CUDA=on" in line


def test_a_file_that_is_no_library_is_named(tmp_path):
    path = tmp_path / "libmmq_cuda.so"
    path.write_text("not a library")
    for line in try_library(str(path)):
        assert line.startswith("RuntimeError cuda: cannot open the CUDA kernels: ")
        assert str(path) in line


def test_a_library_of_another_version_is_refused():
    other = ctypes.util.find_library("m")
    path = next(p for p in Path("/lib/x86_64-linux-gnu").glob(str(other)))
    for line in try_library(str(path)):
        assert "expected a function mmq_cuda_" in line
        assert "another version" in line


@pytest.mark.skipif(not Path(mmq_ext.cuda_library_path()).exists(), reason="CUDA is not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_the_shipped_library_without_a_driver_says_so():
    status, pack = try_library(None)
    for line in (status, pack):
        assert "cudaErrorInsufficientDriver" in line
        assert "no NVIDIA driver was found, or it is too old" in line
    assert "'devices': 0" in status
    assert pack.startswith("RuntimeError pack: CUDA failed with ")


@needs_cuda
@pytest.mark.skipif(on_gpu(), reason="pretends to be other machines")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pretend": "no-driver"}, ["cudaErrorInsufficientDriver", "nvidia-smi"]),
        ({"pretend": "no-device"}, ["cudaErrorNoDevice", "CUDA_VISIBLE_DEVICES"]),
        ({"capability": 75}, ["cudaErrorNoKernelImageForDevice", "7.5", "MMQ_CUDA_ARCHS"]),
    ],
)
def test_machines_that_cannot_run_the_kernels(isa, settings, words):
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    with simulated_cuda(**settings):
        problem_text = str(mmq_ext.cuda_status()["problem"])
        with pytest.raises(RuntimeError, match="pack: CUDA failed with") as caught:
            ops.pack(codes, 4)
    for word in words:
        assert word in problem_text
        assert word in str(caught.value)
    with simulated_cuda():
        assert not mmq_ext.cuda_status()["problem"]
        assert ops.pack(codes, 4).shape == (2, 1)


@needs_cuda
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dtype": torch.float32},
            r"x of float16 or bfloat16 on CUDA \(model.to\(torch.bfloat16\)",
        ),
        ({"mode": "int8"}, "mode exact on CUDA"),
        ({"group_size": 7}, r"group_size=7.*QuantLinear.to_dense\(\)"),
    ],
)
def test_what_the_cuda_gemm_does_not_have(isa, change, message):
    arguments = {"dtype": torch.float16, "mode": "exact", "group_size": 32} | change
    p = problem(2, 8, 70, arguments["group_size"], 4, dtype=arguments["dtype"])
    with cuda_kernels(), pytest.raises(ValueError, match=f"packed_gemm: expected .*{message}"):
        p.run(arguments["mode"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _C.cuda_pack(8, 0, 1, 1, 4, 0), "pack: .* multiples of 16, got 8"),
        (lambda: _C.cuda_pack(0, 0, -1, 1, 4, 0), "pack: expected a size of 0 or more, got -1"),
        (lambda: _C.cuda_unpack(0, 0, 1 << 31, 1, 4, 0), "unpack: expected sizes below 2\\^31"),
        (
            lambda: _C.cuda_repack(0, 0, 1 << 20, 1 << 12, 4, 0),
            "repack: expected matrices of fewer than 2\\^31 elements on CUDA, got 1048576 x 4096",
        ),
        (lambda: _C.cuda_tiles_bytes(1, 1, 9), "bits from 2 to 8, got 9"),
        (lambda: _C.cuda_packed_gemm_workspace(1, 1, 1, 0, 4, 1, 0, 1), "a positive group size"),
        (lambda: _C.cuda_packed_gemm_workspace(1, 1, 1, 1, 4, 0, 0, 1), "float16 or bfloat16"),
        (lambda: _C.cuda_awq_errors_workspace(1, 1, 1, 1, 1, 4, 4, 1), "a grid kind from 0 to 3"),
    ],
)
def test_the_binding_refuses_numbers_before_it_opens_the_library(call, message):
    with pytest.raises(ValueError, match=message):
        call()


LONG, FAR = 1 << 20, 1 << 31
# Sizes of every operator whose product is 2^31 or more elements, or that are 2^31 by themselves.
TOO_LARGE = {
    "pack": lambda: _C.cuda_pack(0, 0, LONG, 1 << 11, 4, 0),
    "unpack": lambda: _C.cuda_unpack(0, 0, 1, FAR, 4, 0),
    "repack": lambda: _C.cuda_repack(0, 0, FAR, 1, 4, 0),
    "unrepack": lambda: _C.cuda_unrepack(0, 0, LONG, 1 << 11, 4, 0),
    "tiles_bytes": lambda: _C.cuda_tiles_bytes(LONG, 1 << 11, 4),
    "packed_gemm": lambda: _C.cuda_packed_gemm_workspace(LONG, 8, 1 << 11, 16, 4, 1, 0, 1),
    "packed_gemm ": lambda: _C.cuda_packed_gemm_workspace(1, LONG, 1 << 11, 16, 4, 1, 0, 1),
    "packed_gemm  ": lambda: _C.cuda_packed_gemm_workspace(LONG, 1 << 11, 16, 16, 4, 1, 0, 1),
    "gptq_block": lambda: _C.cuda_gptq_block(*[0] * 7, FAR, 128, 1, 4, False, 0, 0),
    "gptq_block ": lambda: _C.cuda_gptq_block(*[0] * 7, LONG, 128, 1 << 11, 4, False, 0, 0),
    "awq_errors": lambda: _C.cuda_awq_errors_workspace(LONG, 1 << 11, 1, 1, 16, 4, 0, 1),
    "awq_errors ": lambda: _C.cuda_awq_errors_workspace(1, 1 << 11, LONG, 1, 16, 4, 0, 1),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_sizes_from_2_to_the_31_are_refused(name):
    op = name.strip()
    with pytest.raises(ValueError, match=f"{op}: expected .*(below|fewer than) 2\\^31.* on CUDA"):
        TOO_LARGE[name]()


@pytest.mark.parametrize("which", range(8))
def test_every_misaligned_pointer_of_a_product_is_refused(which):
    addresses = [0] * 8
    addresses[which] = 1024 + 8
    message = "packed_gemm: expected addresses that are multiples of 16, got 1032"
    with pytest.raises(ValueError, match=message):
        _C.cuda_packed_gemm(*addresses, 1, 1, 16, 16, 4, 1, 0, 1, 0)


def test_misaligned_pointers_of_the_other_operators_are_refused():
    calls = {
        "gptq_block": lambda: _C.cuda_gptq_block(*[0] * 6, 4, 1, 1, 1, 4, False, 0, 0),
        "awq_errors": lambda: _C.cuda_awq_errors(0, 0, 4, 0, 0, 1, 1, 1, 1, 16, 4, 0, 1, 0),
        "repack": lambda: _C.cuda_repack(0, 4, 1, 1, 4, 0),
    }
    for op, call in calls.items():
        with pytest.raises(ValueError, match=f"{op}: expected addresses that are multiples of 16"):
            call()


@needs_cuda
def test_operators_take_strided_and_misaligned_tensors(isa):
    """Copied where they are not what the kernels read: the same numbers as from aligned copies."""
    p = problem(3, 8, 64, 32, 4, bias=True, perm=True).as_cuda()
    shifted = torch.cat((torch.zeros(3, 1, dtype=p.x.dtype), p.x), dim=1)[:, 1:]
    flat = torch.cat((torch.zeros(1), p.extra["bias"]))[1:]
    assert not shifted.is_contiguous()
    assert flat.data_ptr() % 16
    other = dataclasses.replace(p, x=shifted, extra={**p.extra, "bias": flat})
    w = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    upper = torch.randn(40, 40, generator=torch.Generator().manual_seed(1)).triu().abs() + 0.1
    upper = upper.triu()
    group_of = torch.zeros(40, dtype=torch.int32)
    scales = torch.full((8, 1), 0.1)
    with cuda_kernels():
        assert torch.equal(other.run("exact"), p.run("exact"))
        plain = ops.gptq_block(w, upper, scales, scales, group_of, 4, True)
        strided = ops.gptq_block(w.T.contiguous().T, upper, scales, scales, group_of, 4, True)
    for a, b in zip(plain, strided, strict=True):
        assert torch.equal(a, b)


@needs_cuda
def test_operators_name_a_tensor_on_another_device(isa):
    p = problem(3, 8, 64, 32, 4).as_cuda()
    with cuda_kernels():
        tiles, affine = p.tiles(), p.affine()
        x = p.x.cuda() if on_gpu() else p.x
        elsewhere = affine if on_gpu() else affine.to("meta")
        arguments = (x, tiles.to(x.device), elsewhere, None, None, None, 8, 4, 32, "exact")
        with pytest.raises(ValueError, match=r"packed_gemm: expected affine on .*, where x is"):
            cuda_ops._packed_gemm(*arguments)


def test_a_borrowed_device_is_asked_for_cpu_tensors():
    """As `mmq.quantize` asks whether the kernels run, before any tensor is there."""
    with use_device(BorrowedGpu()):
        assert on_cuda(torch.empty(0))
        assert ask(torch.empty(0), lambda number: number + 1, 1) == 2


def test_a_tensor_on_another_device_is_named():
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    check_one_device("op", {"x": here, "bias": None, "perm": here})
    with pytest.raises(ValueError, match="op: expected bias on cpu, where x is, got meta"):
        check_one_device("op", {"x": here, "perm": None, "bias": there})


def test_devices_that_do_not_exist_are_refused():
    assert find_device("cpu") == torch.device("cpu")
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(MmqError, match=r"^device: expected"):
            find_device(name)


def test_a_model_on_two_devices_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(MmqError, match=r"1.weight: expected the whole model on cpu, got meta"):
        device_of(model)
    assert device_of(model[1]) == torch.device("meta")


def test_packed_layers_in_float32_are_refused_on_cuda():
    layer = QuantLinear.from_float(torch.nn.Linear(16, 4), QuantSpec(4))
    model = torch.nn.Sequential(layer)
    check_kernels(model, torch.device("cpu"))
    with pytest.raises(MmqError, match=r"^0: expected .* float16 or bfloat16 on CUDA, got float32"):
        check_kernels(model, torch.device("cuda"))
    check_kernels(model.to(torch.bfloat16), torch.device("cuda"))


@needs_cuda
def test_quantizing_a_float32_model_on_cuda_is_refused_before_anything_changes(isa):
    from tiny_models import llava

    model = llava()
    with cuda_kernels(), pytest.raises(MmqError, match=r"expected float16 or bfloat16 weights"):
        quantize(model, Recipe.simple("rtn", 4))
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


@needs_cuda
@pytest.mark.skipif(on_gpu(), reason="pretends to be other machines")
@pytest.mark.parametrize(
    ("settings", "word"),
    [({"pretend": "no-driver"}, "no NVIDIA driver"), ({"capability": 75}, "7.5")],
)
def test_quantizing_where_the_kernels_cannot_run_is_refused(isa, settings, word):
    from tiny_models import llava

    model = llava().to(torch.bfloat16)
    with simulated_cuda(**settings), pytest.raises(MmqError, match=r"^device: expected one that"):
        quantize(model, Recipe.simple("rtn", 4))
    with simulated_cuda(**settings), pytest.raises(MmqError, match=word) as caught:
        check_cuda(torch.empty(0))
    assert "\n" not in str(caught.value)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    with simulated_cuda():
        check_cuda(torch.empty(0))
