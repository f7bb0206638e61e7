# SPDX-License-Identifier: Apache-2.0
"""The instruction sets that tests run over: every one the library knows.

One that this machine lacks is skipped by name; MMQ_REQUIRE=avx2 turns that into a failure.
"""

import os

import pytest

import mmq_ext

KNOWN = ("avx2", "scalar")


def isa_params() -> list:
    required = [name for name in os.environ.get("MMQ_REQUIRE", "").split(",") if name]
    available = mmq_ext.cpu_isas()
    return [
        pytest.param(
            name,
            marks=()
            if name in available or name in required
            else pytest.mark.skip(reason=f"this machine has no {name}"),
        )
        for name in KNOWN
    ]


every_isa = pytest.mark.parametrize("isa", isa_params())
