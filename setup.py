# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled libraries: calls CMake with ninja; CMakeLists.txt is the only source list.

``MMQ_CUDA`` (auto, on, off) and ``MMQ_CUDA_ARCHS`` in the environment choose the CUDA kernels.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures and builds the target ``mmq_ext`` where setuptools expects the module."""

    def build_extension(self, ext: Extension) -> None:
        output_dir = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # An editable install shares its build folder with `make build`.
        build_dir = ROOT / "build" / "dev" if self.inplace else Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        configure = [
            "cmake",
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMMQ_OUTPUT_DIR={output_dir}",
        ]
        for option in ("MMQ_CUDA", "MMQ_CUDA_ARCHS"):
            if os.environ.get(option):
                configure.append(f"-D{option}={os.environ[option]}")
        subprocess.run([*configure, str(ROOT)], cwd=build_dir, check=True)
        subprocess.run(
            ["cmake", "--build", ".", "--target", "mmq_ext", "-j", jobs], cwd=build_dir, check=True
        )


setup(
    ext_modules=[Extension("mmq_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
