# SPDX-License-Identifier: Apache-2.0
"""The loader's side in Hugging Face transformers: a quantizer that fills packed layers.

Importing this module registers quant_method "mmq", so that ``from_pretrained`` replaces the linears
named in the configuration's module table by empty packed layers on the meta device, loads the
canonical tensors by their names, and prepares the layers for the kernels. ``mmq.registration``
imports it in time. ``mmq.load`` is the documented entry: it also checks the file first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mmq.errors import MmqError
from mmq.linear import Layout, QuantLinear

QUANT_METHOD: Final = "mmq"
FORMAT_VERSION: Final = 1


def check_format_version(version: object, where: str) -> None:
    """Refuses a version of the file format that this package does not read, by its number."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise MmqError(f"{where}: expected a format version of 1 or more, got {version!r}")
    if version > FORMAT_VERSION:
        raise MmqError(
            f"{where}: expected format version {FORMAT_VERSION} or older, got {version}; "
            "a newer mmq wrote it"
        )


class MmqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed model: plain data.

    ``modules`` maps module paths to the fields of ``mmq.linear.Layout``; it is the truth about what
    is packed and how. ``version`` is the package that wrote it.

    Raises MmqError for a newer format version, unknown keys, and a table that is none.
    """

    def __init__(
        self,
        format_version: int,
        version: str,
        modules: Mapping[str, Mapping[str, Any]],
        quant_method: str = QUANT_METHOD,
        **unknown: object,
    ) -> None:
        where = "quantization_config"
        check_format_version(format_version, where)
        if unknown:
            raise MmqError(f"{where}: expected keys of version 1, got {sorted(unknown)} too")
        if quant_method != QUANT_METHOD:
            raise MmqError(f"{where}: expected quant_method {QUANT_METHOD}, got {quant_method!r}")
        if not isinstance(modules, Mapping) or not modules:
            raise MmqError(f"{where}.modules: expected a table of packed modules, got {modules!r}")
        self.quant_method = quant_method  # type: ignore[assignment]  # Third parties have a str.
        self.format_version = format_version
        self.version = version
        self.modules = dict(modules)
        self.layouts()

    def layouts(self) -> dict[str, Layout]:
        """The table with checked entries."""
        return {path: Layout.from_dict(path, data) for path, data in self.modules.items()}


class MmqHfQuantizer(HfQuantizer):
    """Fills packed layers while transformers loads a checkpoint; it never quantizes."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        dtype = model.dtype
        # transformers keeps some parts in float32 when it loads float16; they compute in it too.
        kept = _kept_in_float32(model) if dtype == torch.float16 else []
        config: Any = self.quantization_config
        replace_linears(model, config.layouts(), dtype=dtype, float32=kept)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        prepare_layers(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def replace_linears(
    model: nn.Module,
    layouts: Mapping[str, Layout],
    *,
    dtype: torch.dtype = torch.float32,
    float32: Collection[str] = (),
) -> None:
    """Puts empty packed layers on the meta device where ``layouts`` says.

    They compute in ``dtype``, those with a path part in ``float32`` in that type.

    Raises MmqError for a path that is no linear of that shape: the table is another model's.
    """
    for path, layout in layouts.items():
        try:
            linear = model.get_submodule(path)
        except AttributeError as error:
            raise MmqError(
                f"{path}: expected a linear of this model, got none; the module table is that of "
                "another model"
            ) from error
        if not isinstance(linear, nn.Linear):
            raise MmqError(f"{path}: expected a linear, got {type(linear).__name__}")
        found = (linear.out_features, linear.in_features, linear.bias is not None)
        if found != (layout.n, layout.k, layout.bias):
            raise MmqError(
                f"{path}: expected shape [{found[0]}, {found[1]}] and bias {found[2]}, got "
                f"[{layout.n}, {layout.k}] and {layout.bias}; the module table is that of another "
                "model"
            )
        kept = not set(path.split(".")).isdisjoint(float32)
        layer = QuantLinear.empty(layout, dtype=torch.float32 if kept else dtype)
        model.set_submodule(path, layer)


def prepare_layers(model: nn.Module) -> None:
    """Checks the packed layers of ``model``, which a loader has filled, and makes them ready.

    Each layer has one thread, so that the work is cut once and no thread waits for its share of the
    next short call. Raises MmqError that names the first wrong tensor in the model's order.
    """
    layers = {path: part for path, part in model.named_modules() if isinstance(part, QuantLinear)}
    if any(layer.scales.device.type != "cpu" for layer in layers.values()):
        for path, layer in layers.items():
            _prepare(path, layer)
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "mmq", torch.set_num_threads, (1,)) as pool:
            for _ in pool.map(_prepare, layers, layers.values()):
                pass
    finally:
        torch.set_num_threads(threads)  # It is each thread's own, and what new threads begin with.


def _prepare(path: str, layer: QuantLinear) -> None:
    layer.narrow_scales()
    layer.packed.validate(path)
    layer.prepare()


def _kept_in_float32(model: nn.Module) -> list[str]:
    """Names that the model and its parts keep in float32, such as qformer and T5's wo."""
    lists = (getattr(module, "_keep_in_fp32_modules", None) for module in model.modules())
    return [name for names in lists if names for name in names]


def _register() -> None:
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(MmqConfig)
        register_quantizer(QUANT_METHOD)(MmqHfQuantizer)


_register()
