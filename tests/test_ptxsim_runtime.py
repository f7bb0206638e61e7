# SPDX-License-Identifier: Apache-2.0
"""The stand-in CUDA runtime under what nvcc makes of probe.cu: launches, errors, attributes."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from simulator import ROOT, Simulator, SimulatorError, load, needs_simulator

pytestmark = [
    needs_simulator,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
]

OUT_OF_RESOURCES, INVALID_VALUE, INVALID_CONFIGURATION = 701, 1, 9
NO_IMAGE, LAUNCH_FAILURE, NOT_SUPPORTED, BAD_HANDLE = 209, 719, 801, 400


def compile_probe(target: Path, *flags: str) -> Path:
    command = ["nvcc", "-std=c++17", "-O2", "-lineinfo", "--cudart=none", "-shared", "-Xcompiler"]
    command += ["-fPIC", "-Xlinker", "--unresolved-symbols=ignore-all", *flags, "-o", str(target)]
    subprocess.run([*command, str(ROOT / "tests/ptxsim/probe.cu")], check=True)
    return target


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    load()  # first, so that the probe's calls bind to it
    architecture = "arch=compute_80,code=[compute_80,sm_80]"
    path = tmp_path_factory.mktemp("probe") / "probe.so"
    library = ctypes.CDLL(str(compile_probe(path, "-gencode", architecture, "--no-compress")))
    library.probe_name.restype = library.probe_text.restype = ctypes.c_char_p
    return library


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def launch(probe: ctypes.CDLL, sim: Simulator, count: int, shared_bytes: int) -> int:
    """Runs the kernel on 0, 1, ... and compares, if the launch was accepted."""
    factors = np.array([1, 2, 3, 4], dtype=np.float32)
    assert probe.probe_set_factors(address(factors)) == 0
    x = np.arange(count, dtype=np.float32)
    sim.register(x, "x")
    status = probe.probe_launch(address(x), count, shared_bytes)
    if status == 0:
        i = np.arange(count)
        taken = i // 64 * 64 + 63 - i % 64
        want = np.where(taken < count, taken, 0) * factors[i & 3] + 5
        assert x.tolist() == want.tolist()
    sim.unregister(x)
    return int(status)


def test_launches_with_symbols_and_dynamic_shared_memory(
    probe: ctypes.CDLL, sim: Simulator
) -> None:
    assert launch(probe, sim, 200, 256) == 0
    [report] = sim.launches()
    assert "reverse_scaled" in report["kernel"]
    assert report["grid"] == [4, 1, 1]
    assert report["shared_bytes"] >= 256
    assert any(entry["file"].endswith("probe.cu") for entry in report["by_line"])


def test_extended_launch(probe: ctypes.CDLL, sim: Simulator) -> None:
    x = np.zeros(64, dtype=np.float32)
    sim.register(x, "x")
    assert probe.probe_launch_ex(address(x), 64, 0) == 0
    assert (x == 5).all()
    assert probe.probe_launch_ex(address(x), 64, 1) == NOT_SUPPORTED
    assert "launch attribute 2" in sim.last_error()


def test_large_shared_memory_needs_the_opt_in(probe: ctypes.CDLL, sim: Simulator) -> None:
    assert launch(probe, sim, 64, 48 * 1024) == 0
    assert launch(probe, sim, 64, 48 * 1024 + 4) == INVALID_VALUE
    assert "expected at most 49152 bytes" in sim.last_error()
    assert probe.probe_opt_in(166_913) == INVALID_VALUE
    assert probe.probe_last_error() == INVALID_VALUE
    assert probe.probe_opt_in(166_912) == 0
    assert launch(probe, sim, 64, 166_912) == 0
    assert launch(probe, sim, 64, 166_916) == INVALID_VALUE
    assert probe.probe_opt_in(48 * 1024) == 0


def test_refused_launches_do_not_break_the_context(probe: ctypes.CDLL, sim: Simulator) -> None:
    x = np.zeros(64, dtype=np.int32)
    sim.register(x, "x")
    assert probe.probe_small_blocks(address(x), 65) == OUT_OF_RESOURCES
    assert probe.probe_small_blocks(address(x), 2048) == INVALID_CONFIGURATION
    assert probe.probe_launch(address(x), 0, 256) == INVALID_CONFIGURATION
    assert probe.probe_synchronize() == 0
    assert probe.probe_last_error() == 0
    assert probe.probe_small_blocks(address(x), 64) == 0
    assert x.tolist() == list(range(64))


def test_a_trap_fails_the_next_call_and_stays(probe: ctypes.CDLL, sim: Simulator) -> None:
    assert probe.probe_trap() == 0
    assert probe.probe_synchronize() == LAUNCH_FAILURE
    assert probe.probe_last_error() == LAUNCH_FAILURE
    assert probe.probe_last_error() == LAUNCH_FAILURE
    assert probe.probe_set_device(0) == LAUNCH_FAILURE
    [finding] = sim.take("trap")
    assert finding.file.endswith("probe.cu")
    assert probe.probe_synchronize() == 0


def test_findings_do_not_fail_the_call(probe: ctypes.CDLL, sim: Simulator) -> None:
    x = np.zeros(64, dtype=np.int32)
    sim.register(x[:63], "x")
    assert probe.probe_small_blocks(address(x), 64) == 0
    [finding] = sim.take("out-of-bounds")
    source = (ROOT / "tests/ptxsim/probe.cu").read_text().splitlines()
    assert "x[threadIdx.x] = threadIdx.x" in source[finding.line - 1]


def test_memory_streams_and_events(probe: ctypes.CDLL, sim: Simulator) -> None:
    wrong = ctypes.c_int(-1)
    assert probe.probe_memory(ctypes.byref(wrong)) == 0
    assert wrong.value == 0
    assert probe.probe_bad_stream() == BAD_HANDLE
    assert probe.probe_peek() == BAD_HANDLE
    assert probe.probe_last_error() == BAD_HANDLE
    assert probe.probe_last_error() == 0


def test_copies_check_the_device_side(probe: ctypes.CDLL, sim: Simulator) -> None:
    device, host = np.zeros(8, dtype=np.int32), np.arange(8, dtype=np.int32)
    assert probe.probe_copy_to(address(device), address(host), 32) == INVALID_VALUE
    sim.register(device, "device")
    assert probe.probe_copy_to(address(device), address(host), 36) == INVALID_VALUE
    assert probe.probe_copy_to(address(device), address(host), 32) == 0
    assert device.tolist() == host.tolist()
    probe.probe_last_error()


# {capability: multiprocessors, opt-in bytes, threads, blocks of a multiprocessor}
DEVICES = {
    80: (108, 166_912, 2048, 32),
    86: (82, 101_376, 1536, 16),
    89: (128, 101_376, 1536, 24),
    90: (132, 232_448, 2048, 32),
    120: (170, 101_376, 1536, 24),
}


@pytest.mark.parametrize("capability", list(DEVICES))
def test_properties_of_the_architectures(probe: ctypes.CDLL, capability: int) -> None:
    with Simulator(capability=capability) as sim:
        values = (ctypes.c_int * 5)()
        assert probe.probe_properties(values) == 0
        assert tuple(values) == (capability, *DEVICES[capability])
        got = ctypes.c_int()
        for number, want in ((75, capability // 10), (76, capability % 10), (10, 32),
                             (97, values[2]), (16, values[1]), (8, 49_152)):  # fmt: skip
            assert probe.probe_device_attribute(number, ctypes.byref(got)) == 0
            assert got.value == want
        assert probe.probe_device_attribute(14, ctypes.byref(got)) == NOT_SUPPORTED
        assert probe.probe_last_error() == NOT_SUPPORTED
        assert launch(probe, sim, 100, 256) == 0  # the PTX of compute_80 runs on all of them


def test_occupancy(probe: ctypes.CDLL, sim: Simulator) -> None:
    """2,048 threads, 32 blocks and 164 KiB of shared memory; each block costs 1 KiB more."""
    blocks = ctypes.c_int()
    assert probe.probe_opt_in(100_000) == 0
    cases = ((1024, 0, 2), (256, 0, 8), (32, 0, 32), (256, 40_000, 4), (64, 100_000, 1))
    for threads, shared_bytes, want in cases:
        assert probe.probe_blocks_per_sm(threads, shared_bytes, ctypes.byref(blocks)) == 0
        assert blocks.value == want, (threads, shared_bytes)
    assert probe.probe_opt_in(48 * 1024) == 0


def test_function_attributes(probe: ctypes.CDLL, sim: Simulator) -> None:
    values = (ctypes.c_int * 4)()
    assert probe.probe_attributes(values) == 0
    registers, static_bytes, threads, dynamic_bytes = values
    assert 4 <= registers <= 32  # read from the machine code of sm_80
    assert (static_bytes, threads, dynamic_bytes) == (4096, 1024, 48 * 1024 - 4096)


@pytest.mark.parametrize(
    ("pretend", "error", "name"),
    [
        ("no-driver", 35, "cudaErrorInsufficientDriver"),
        ("no-device", 100, "cudaErrorNoDevice"),
    ],
)
def test_pretended_machines_without_a_device(
    probe: ctypes.CDLL, sim: Simulator, pretend: str, error: int, name: str
) -> None:
    sim.configure("pretend", pretend)
    count = ctypes.c_int(7)
    assert probe.probe_count(ctypes.byref(count)) == error
    assert probe.probe_launch(None, 64, 256) == error
    assert probe.probe_name(error) == name.encode()
    sim.configure("pretend", "")
    sim.clear()
    assert probe.probe_count(ctypes.byref(count)) == 0
    assert count.value == 1


def test_an_architecture_without_ptx(probe: ctypes.CDLL) -> None:
    """compute_80 does not run on 7.5; the process stays usable."""
    with Simulator(capability=75) as sim:
        assert probe.probe_launch(None, 64, 256) == NO_IMAGE
        assert "expected PTX for compute_75 or lower" in sim.last_error()
        sim.configure("capability", 80)
        assert launch(probe, sim, 64, 256) == 0


def test_compressed_ptx_names_the_flag(sim: Simulator, tmp_path: Path) -> None:
    flags = ["-gencode", "arch=compute_80,code=compute_80", "-Xfatbin", "-compress-all"]
    library = ctypes.CDLL(str(compile_probe(tmp_path / "compressed.so", *flags)))
    assert library.probe_launch(None, 64, 256) == 218
    assert "--no-compress" in sim.last_error()


def test_error_names_and_texts(probe: ctypes.CDLL) -> None:
    assert probe.probe_name(0) == b"cudaSuccess"
    assert probe.probe_text(209) == b"no kernel image is available for execution on the device"
    assert probe.probe_name(123456) == b"unrecognized error code"


def test_unknown_settings_are_refused(sim: Simulator) -> None:
    for key, value, message in (
        ("speed", 1, "expected one of capability"),
        ("slice", "fast", "expected a number for slice"),
        ("capability", 81, "expected a capability of"),
        ("pretend", "gpu", "expected pretend to be"),
    ):
        with pytest.raises(SimulatorError, match=message):
            sim.configure(key, value)
