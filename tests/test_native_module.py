# SPDX-License-Identifier: Apache-2.0
"""The compiled module: what it links, which kernels it picks, and whose threads it uses."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from isas import KNOWN

import mmq_ext
from mmq_ext import _C, ops

MODULE = Path(_C.__file__)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def elf(*arguments: str) -> str:
    return subprocess.run(
        [*arguments, str(MODULE)], capture_output=True, text=True, timeout=60, check=True
    ).stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF")
def test_dynamic_symbols_name_nothing_of_torch():
    symbols = elf("nm", "-D", "-C")
    assert "PyInit__C" in symbols
    assert re.findall(r".*(?:at::|c10|torch|caffe2|ATen).*", symbols) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF")
def test_needs_only_the_c_and_cpp_runtime():
    needed = re.findall(r"NEEDED.*\[(.*)\]", elf("readelf", "-d"))
    allowed = r"lib(stdc\+\+|m|gcc_s|c|pthread|dl)\.so\.\d+|ld-linux.*"
    assert needed
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []


def test_one_openmp_runtime_is_mapped_and_shared():
    p = run_python(
        "import torch, mmq_ext; from mmq_ext import ops\n"
        "ops.packed_gemm(torch.randn(64, 256) @ torch.randn(256, 256),\n"
        "    torch.zeros(ops.tiles_bytes(256, 256, 4), dtype=torch.uint8),\n"
        "    torch.zeros(ops.affine_floats(256, 2)), n=256, bits=4, group_size=128)\n"
        "print(mmq_ext.threading_backend())\n"
        "print(open('/proc/self/maps').read())"
    )
    assert p.returncode == 0, p.stderr
    backend, maps = p.stdout.split("\n", 1)
    files = {Path(line.split()[-1]).name for line in maps.splitlines() if "/" in line}
    runtimes = {name for name in files if re.match(r"lib(gomp|omp|iomp5)\b", name)}
    assert runtimes == {backend}


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert _C.max_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", mmq_ext.cpu_isas())
def test_the_environment_forces_an_instruction_set(name):
    p = run_python("import mmq_ext; print(mmq_ext.cpu_isa())", MMQ_CPU_ISA=name)
    assert p.stdout.strip() == name, p.stderr


def test_an_unknown_instruction_set_is_an_error():
    p = run_python("import mmq_ext; mmq_ext.cpu_isa()", MMQ_CPU_ISA="avx3")
    assert p.returncode != 0
    expected = f"ValueError: cpu_isa: expected one of {', '.join(KNOWN)}, got avx3"
    assert expected in p.stderr
    with pytest.raises(ValueError, match="got avx3"), mmq_ext.use_isa("avx3"):
        pass


def test_use_isa_is_undone():
    before = mmq_ext.cpu_isa()
    with mmq_ext.use_isa("scalar"):
        assert mmq_ext.cpu_isa() == "scalar"
    assert mmq_ext.cpu_isa() == before


def test_the_stub_lists_what_the_module_has():
    stub = (MODULE.parent / "_C.pyi").read_text()
    declared = {
        name: [part.split(":")[0].strip() for part in parameters.split(",") if part.strip()]
        for name, parameters in re.findall(r"def (\w+)\(([^)]*)\)", stub)
    }
    compiled = {name: member for name, member in vars(_C).items() if inspect.isroutine(member)}
    assert set(declared) == set(compiled)
    for name, member in compiled.items():
        signature = (member.__doc__ or "").split("\n")[0]
        assert signature.count(":") == len(declared[name]), f"{name}: {signature}"


def test_the_binding_refuses_sizes_before_it_reads_memory():
    with pytest.raises(ValueError, match="packed_gemm: expected a size of 0 or more, got -1"):
        _C.packed_gemm(0, 0, 0, 0, 0, -1, 1, 1, 32, 4, 0, 2, 0, False)
    with pytest.raises(ValueError, match="mode 0 \\(exact\\) or 1 \\(int8\\), got 2"):
        _C.packed_gemm(0, 0, 0, 0, 0, 1, 1, 1, 32, 4, 2, 2, 0, False)
    with pytest.raises(ValueError, match="bits from 2 to 8, got 9"):
        _C.repack(0, 1, 1, 9, 0)


def test_every_op_of_the_library_has_a_typed_function():
    for name in ("pack", "unpack", "repack", "unrepack", "packed_gemm"):
        assert callable(getattr(ops, name))
        assert hasattr(torch.ops.mmq, name)
