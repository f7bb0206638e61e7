# SPDX-License-Identifier: Apache-2.0
"""Saving and loading packed models: safetensors, JSON, no pickle, no code from the folder.

A folder holds ``config.json`` (the model's configuration with a ``quantization_config``: format
version and module table), ``model.safetensors`` (canonical tensors, see ``mmq.packed``; dense ones
in 16 bits where that is exact), ``checksums.json`` (size and SHA-256 of the tensor file),
``manifest.json`` (how it was made) and the processor's files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from mmq.architectures import ARCHITECTURES
from mmq.device import check_cuda, check_kernels, find_device
from mmq.errors import MmqError
from mmq.files import CHECKSUMS_NAME, checksum, header, line, read_json, unchanged, write_json
from mmq.linear import Layout, QuantLinear
from mmq.manifest import MANIFEST_NAME, Manifest, package_version
from mmq.stored import stored_tensors

CONFIG_NAME: Final = "config.json"
TENSORS_NAME: Final = "model.safetensors"
GENERATION_NAME: Final = "generation_config.json"
MANIFEST_ATTRIBUTE: Final = "mmq_manifest"
_PROCESSOR_NAMES: Final = ("processor_config.json", "preprocessor_config.json")
# What transformers raises for a folder whose parts are of the wrong type or do not fit.
_UNFIT: Final = (
    *(OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)
_FILE_DTYPES: Final = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16"} | {
    torch.float32: "F32"
}


def save(
    model: nn.Module,
    folder: str | Path,
    processor: Any = None,
    *,
    manifest: Manifest | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes ``model`` to ``folder``, all of it or nothing.

    Everything is written to a folder beside it, which then takes its name.

    Args:
      model: a supported model, packed or dense.
      folder: created; its parent must exist.
      processor: anything with ``save_pretrained``, or None.
      manifest: None takes the one that ``mmq.quantize`` or ``mmq.load`` left on the model.
      overwrite: whether an existing folder may be replaced.

    Returns the folder. Raises MmqError for an unsupported model and where the folder exists.
    """
    folder = Path(folder)
    name = type(model).__name__
    _model_class(name, str(folder))
    if folder.exists() and not overwrite:
        raise MmqError(f"{folder}: expected a new folder (or overwrite), it exists")
    if not folder.parent.is_dir():
        raise MmqError(f"{folder}: expected an existing parent folder {folder.parent}")
    manifest = getattr(model, MANIFEST_ATTRIBUTE, None) if manifest is None else manifest
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        target = work / folder.name
        target.mkdir()
        _write(model, target, processor, manifest)
        _replace(folder, target, work / "replaced")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    device: str | torch.device = "cpu",
) -> Any:
    """The model in ``folder``, in evaluation mode.

    A packed model's logits equal those of the model that was saved, if ``dtype`` is None. A dense
    folder of a supported class loads too, in float32 by default.

    Args:
      folder: what ``mmq.save`` or (dense) ``save_pretrained`` wrote.
      dtype: the compute dtype; None is the dtype that was saved. Packed layers on CUDA need
        bfloat16, or float16 where transformers keeps no part in float32.
      device: cpu, cuda or cuda:N.

    Raises MmqError, one line, for a folder that is missing, truncated, corrupted, of a newer
    format, or whose parts do not belong together.
    """
    folder = Path(folder)
    where = find_device(str(device))
    data = read_json(folder / CONFIG_NAME)
    if data.get("quantization_config") is None:
        return _load_dense(folder, data, dtype).to(where)
    if where.type == "cuda":
        check_cuda(torch.empty(0, device=where))
    model = _load_packed(folder, data, dtype)
    check_kernels(model, where)
    return model.to(where)


def load_processor(folder: str | Path) -> Any:
    """The processor saved in ``folder``, None where there is none. Never runs the folder's code."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in _PROCESSOR_NAMES):
        return None
    from transformers import AutoProcessor

    loader: Any = AutoProcessor
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except _UNFIT as error:
        raise MmqError(f"{folder}: expected a processor, got {line(error)}") from error


def _write(model: Any, target: Path, processor: Any, manifest: Manifest | None) -> None:
    from mmq.hf import FORMAT_VERSION, QUANT_METHOD

    config = json.loads(model.config.to_json_string())
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(_model_dtype(model)).removeprefix("torch.")
    config.pop("quantization_config", None)
    for part in config.values():
        if isinstance(part, dict):
            part.pop("dtype", None)  # The loader writes it into the parts; the model's counts.
    layouts = {
        path: module.layout.to_dict()
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }
    if layouts:
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "version": package_version("mmq"),
            "modules": layouts,
        }
    write_json(target / CONFIG_NAME, config)
    save_file(stored_tensors(model), target / TENSORS_NAME, metadata={"format": "pt"})
    write_json(target / CHECKSUMS_NAME, {TENSORS_NAME: checksum(target / TENSORS_NAME)})
    if manifest is not None:
        write_json(target / MANIFEST_NAME, manifest.to_dict())
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(target)
    if processor is not None:
        processor.save_pretrained(target)


def _model_dtype(model: Any) -> torch.dtype:
    """The dtype to load in: the configuration's where the model has it, for parts may be wider."""
    stated = getattr(model.config, "dtype", None)
    held = {parameter.dtype for parameter in model.parameters()}
    if isinstance(stated, torch.dtype) and stated in held:
        return stated
    return model.dtype  # type: ignore[no-any-return]


def _replace(folder: Path, target: Path, aside: Path) -> None:
    """Gives ``target`` the name ``folder``; what had it goes ``aside``, and back on failure."""
    if folder.exists():
        folder.rename(aside)
    try:
        target.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise


def _model_class(name: str, where: str) -> Any:
    known = sorted({architecture.model_class for architecture in ARCHITECTURES})
    if name not in known:
        raise MmqError(f"{where}: expected a model of class {', '.join(known)}, got {name}")
    import transformers

    return getattr(transformers, name)


def _class_of(data: Mapping[str, Any], folder: Path) -> Any:
    names = data.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise MmqError(f"{folder / CONFIG_NAME}: expected one architecture, got {names!r}")
    return _model_class(str(names[0]), str(folder / CONFIG_NAME))


def _layouts(table: object, folder: Path) -> dict[str, Layout]:
    from mmq.hf import QUANT_METHOD, MmqConfig, check_format_version

    where = f"{folder / CONFIG_NAME}: quantization_config"
    if not isinstance(table, dict):
        raise MmqError(f"{where}: expected a JSON object, got {type(table).__name__}")
    if table.get("quant_method") != QUANT_METHOD:
        raise MmqError(
            f"{where}: expected quant_method {QUANT_METHOD}, got {table.get('quant_method')!r}"
        )
    check_format_version(table.get("format_version"), where)
    try:
        return MmqConfig(**table).layouts()
    except TypeError as error:  # a key is missing
        raise MmqError(f"{where}: {line(error)}") from error
    except MmqError as error:
        raise MmqError(f"{folder / CONFIG_NAME}: {error}") from error


def _config(cls: Any, folder: Path) -> Any:
    try:
        return cls.config_class.from_pretrained(folder, local_files_only=True)
    except _UNFIT as error:
        name = cls.config_class.__name__
        raise MmqError(f"{folder / CONFIG_NAME}: expected a {name}, got {line(error)}") from error


def _untie_packed(config: Any, layouts: Mapping[str, Layout]) -> None:
    """A packed head shares nothing, whatever the configuration class makes of its own flag."""
    if any(path.rpartition(".")[2] == "lm_head" for path in layouts):
        for part in (config, getattr(config, "text_config", None)):
            if part is not None:
                part.tie_word_embeddings = False


def _skeleton(cls: Any, config: Any, layouts: Mapping[str, Layout]) -> Any:
    """The model without memory, packed layers in place."""
    from mmq.hf import replace_linears

    try:
        with torch.device("meta"):
            model = cls(config)
    except _UNFIT as error:
        raise MmqError(f"{cls.__name__}: expected a valid config, got {line(error)}") from error
    replace_linears(model, layouts)
    return model


def _check_tensors(
    skeleton: Any,
    layouts: Mapping[str, Layout],
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    path: Path,
) -> None:
    """Compares the file's names, shapes and packed types with those of the model."""
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    tied = set(skeleton.all_tied_weights_keys)
    missing = sorted(set(expected) - set(found) - tied)
    unexpected = sorted(set(found) - set(expected))
    if missing:
        other = f"; it holds {unexpected[0]}, as of another model" if unexpected else ""
        raise MmqError(f"{path}: expected a tensor {_first(missing)}, got none{other}")
    if unexpected:
        raise MmqError(f"{path}: expected the model's tensors only, got {_first(unexpected)}")
    for name, (_, shape) in found.items():
        if shape != expected[name]:
            raise MmqError(
                f"{path}: expected {name} of shape {list(expected[name])}, got {list(shape)}"
            )
    for module, layout in layouts.items():
        for name, (dtype, _) in layout.tensors().items():
            kind = found[f"{module}.{name}"][0]
            if kind != _FILE_DTYPES[dtype]:
                raise MmqError(
                    f"{path}: expected {module}.{name} of type {_FILE_DTYPES[dtype]}, got {kind}"
                )


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _load_packed(folder: Path, data: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    path = folder / TENSORS_NAME
    with unchanged([path]):
        cls = _class_of(data, folder)
        layouts = _layouts(data["quantization_config"], folder)
        config = _config(cls, folder)
        tensors = header(path)
        _untie_packed(config, layouts)
        _check_tensors(_skeleton(cls, config, layouts), layouts, tensors, path)
        kind = getattr(config, "dtype", None) if dtype is None else dtype
        if not isinstance(kind, torch.dtype):
            kind = torch.float32
        model = _from_pretrained(cls, folder, dtype=kind, config=config)
    if (folder / MANIFEST_NAME).is_file():
        setattr(model, MANIFEST_ATTRIBUTE, Manifest.read(folder / MANIFEST_NAME))
    return model


def _load_dense(folder: Path, data: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    files = sorted(folder.glob("*.safetensors"))
    with unchanged(files):
        cls = _class_of(data, folder)
        for path in files:
            header(path)
        return _from_pretrained(cls, folder, dtype=torch.float32 if dtype is None else dtype)


def _from_pretrained(cls: Any, folder: Path, **arguments: Any) -> Any:
    if (folder / GENERATION_NAME).is_file():
        read_json(folder / GENERATION_NAME)  # transformers passes over one that it cannot read.
    try:
        model, info = cls.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    except MmqError:
        raise
    except _UNFIT as error:
        raise MmqError(f"{folder}: expected a {cls.__name__}, got {line(error)}") from error
    _check_loading(info, folder)
    return model


def _check_loading(info: Mapping[str, Any], folder: Path) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            first = sorted(map(str, info[kind]))[0]
            raise MmqError(f"{folder}: expected every tensor to load, got {kind}: {first}")
