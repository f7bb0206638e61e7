# SPDX-License-Identifier: Apache-2.0
"""Loads the PTX interpreter before any test can open the CUDA kernels, which would bind them to
NVIDIA's runtime for the life of the process."""

from simulated import on_gpu
from simulator import available, load


def pytest_configure() -> None:
    if available() and not on_gpu():
        load()
