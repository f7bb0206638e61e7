# SPDX-License-Identifier: Apache-2.0
"""What ptxas reports of every kernel, against the budgets: no spills, registers below a number."""

import os
import re
from pathlib import Path

import pytest
from budgets import registers
from cuda_ptxas import Usage, entries, kernel_name, usage_of

import mmq_ext

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


def over_budget(table: dict[str, dict[str, Usage]]) -> list[str]:
    """What spills, or has more registers than its budget, or has none."""
    limits = registers()
    return [
        f"{kernel} for {arch}: expected at most {limit} registers and no spills, got {usage}"
        for kernel, row in table.items()
        for arch, usage in row.items()
        if (limit := limits.get(kernel, {}).get(arch, 0)) < usage.registers or usage.spill_bytes
    ]


def test_what_is_over_budget_is_named():
    fits, spills = Usage(registers=registers()["pack_kernel"]["sm_80"]), Usage(registers=8)
    spills.spill_bytes = 4
    more = Usage(registers=fits.registers + 1)
    assert not over_budget({"pack_kernel": {"sm_80": fits}})
    for kernel, arch, usage in (
        ("pack_kernel", "sm_80", more),
        ("pack_kernel", "sm_80", spills),
        ("pack_kernel", "sm_42", fits),
        ("another_kernel", "sm_80", fits),
    ):
        (line,) = over_budget({kernel: {arch: usage}})
        assert line.startswith(f"{kernel} for {arch}: expected")


@built
def test_no_spills_and_registers_within_budget():
    table = usage_of(BUILD)
    assert table.keys() == registers().keys()
    assert not over_budget(table)


@built
def test_every_architecture_of_the_library_was_judged():
    """All six of a wheel in `make test`; a library for fewer says so."""
    if "MMQ_CUDA_BUILD" in os.environ:
        names = {f"sm_{number}" for number in (80, 86, 89, 90, 100, 120)}
    else:
        built_for = str(mmq_ext.cuda_status()["architectures"])
        names = {f"sm_{number}" for number in re.findall(r"(?<!\S)\d+", built_for)}
    for kernel, row in usage_of(BUILD).items():
        assert row.keys() == names, f"{kernel}: expected {sorted(names)}, got {sorted(row)}"
