# SPDX-License-Identifier: Apache-2.0
"""Registers quant_method "mmq" with transformers, without importing transformers for it.

After ``import mmq``, ``from_pretrained`` of transformers must know the format: where it does not,
it only warns and leaves random weights in place of the packed ones. Importing transformers' table
of quantizers takes longer than importing torch, and most uses of mmq do without. So the table is
extended where it exists already, and otherwise as soon as somebody imports it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

QUANTIZER_TABLE: Final = "transformers.quantizers.auto"


class _Loader(Loader):
    """Runs the table's own loader, then adds mmq's row."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        importlib.import_module("mmq.hf")


class _Finder(MetaPathFinder):
    """Finds the table once, as the finders behind it do, and steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != QUANTIZER_TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Makes transformers know the format, now or when its table of quantizers is imported."""
    if QUANTIZER_TABLE in sys.modules:
        importlib.import_module("mmq.hf")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
