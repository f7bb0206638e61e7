# SPDX-License-Identifier: Apache-2.0
"""What ptxas reports of every kernel, against the budgets: no spills, registers below a number."""

import os
from pathlib import Path

import pytest
from budgets import registers
from cuda_ptxas import entries, kernel_name, usage_of

BUILD = Path(os.environ.get("MMQ_CUDA_BUILD", Path(__file__).parents[1] / "build/dev/cuda"))
built = pytest.mark.skipif(
    not list(BUILD.glob("*.o.log")) and "cuda" not in os.environ.get("MMQ_REQUIRE", ""),
    reason=f"no reports of ptxas in {BUILD} (no nvcc)",
)
LOG = """
ptxas info    : Compiling entry function '_ZN3mmq4cuda12_GLOBAL__N_111pack_kernelEPKhll' for 'sm_80'
ptxas info    : Function properties for _ZN3mmq4cuda12_GLOBAL__N_111pack_kernelEPKhlli
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN3mmq4cuda12_GLOBAL__N_111pack_kernelEPKhll' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, 400 bytes cmem[0]
"""


def test_reading_a_report():
    first, second = entries(LOG)
    assert first[:2] == ("pack_kernel", "sm_80")
    assert (first[2].registers, first[2].spill_bytes, first[2].shared_bytes) == (30, 16, 2048)
    assert second[1] == "sm_90"
    assert (second[2].registers, second[2].spill_bytes, second[2].shared_bytes) == (28, 0, 0)
    assert kernel_name("_ZN3mmq4cuda7prepareINS0_8Bfloat16EEEvNS0_1PE") == "prepare"
    with pytest.raises(ValueError, match="a mangled C"):
        kernel_name("main")


@built
def test_no_spills_and_registers_within_budget():
    limits = registers()
    for kernel, row in usage_of(BUILD).items():
        assert kernel in limits, f"{kernel} has no budget of registers"
        for arch, usage in row.items():
            assert usage.spill_bytes == 0, f"{kernel} for {arch}: {usage}"
            assert 0 < usage.registers <= limits[kernel], f"{kernel} for {arch}: {usage}"
