# SPDX-License-Identifier: Apache-2.0
"""Packed low-bit quantization of vision-language models, part by part, with native kernels.

    model = mmq.load(folder)                                   # dense or packed
    manifest = mmq.quantize(model, mmq.Recipe.simple("gptq", 3), samples)
    mmq.save(model, out)

``mmq.rtn``, ``mmq.gptq`` and ``mmq.awq`` work on one weight matrix and return it packed with a
report; ``mmq.QuantLinear`` is the layer that runs it. transformers is imported when a model is
loaded or saved, not before; its own ``from_pretrained`` reads packed folders once mmq is imported.
"""

from mmq.awq import awq
from mmq.checkpoint import load, load_processor, save
from mmq.errors import MmqError
from mmq.gptq import gptq
from mmq.linear import QuantLinear
from mmq.manifest import Manifest
from mmq.options import AwqOptions, GptqOptions
from mmq.packed import PackedWeight
from mmq.quantize import ProgressEvent, quantize
from mmq.recipe import Recipe, load_recipe, parse_recipe
from mmq.registration import register_with_transformers
from mmq.report import Report
from mmq.rtn import rtn
from mmq.spec import QuantSpec

__all__ = [
    "AwqOptions",
    "GptqOptions",
    "Manifest",
    "MmqError",
    "PackedWeight",
    "ProgressEvent",
    "QuantLinear",
    "QuantSpec",
    "Recipe",
    "Report",
    "awq",
    "gptq",
    "load",
    "load_processor",
    "load_recipe",
    "parse_recipe",
    "quantize",
    "rtn",
    "save",
]

register_with_transformers()
