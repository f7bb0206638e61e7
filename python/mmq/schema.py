# SPDX-License-Identifier: Apache-2.0
"""Files that people write, YAML or JSON, read strictly: every wrong key is named at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mmq.errors import MmqError


class Strict(BaseModel):
    """Unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Schema = TypeVar("Schema", bound=Strict)


def read_text(path: Path, noun: str) -> str:
    """The text of a .yaml, .yml or .json file. Raises MmqError that names it."""
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise MmqError(f"{path}: expected a {noun} in .yaml, .yml or .json")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MmqError(f"{path}: expected a readable {noun}, got {error}") from error


def validated(schema: type[Schema], data: Mapping[Any, Any]) -> Schema:
    """``data`` as a ``schema``.

    Raises MmqError with every wrong key in one line and, for a misspelt one, the nearest known key.
    """
    _refuse_nulls(data, "")
    try:
        return schema.model_validate(dict(data))
    except ValidationError as error:
        lines = (_explain(item, schema) for item in error.errors())
        raise MmqError("; ".join(lines)) from error


def _refuse_nulls(value: object, where: str) -> None:
    """An empty YAML value would read like an absent key; a section without keys is written {}."""
    if value is None:
        raise MmqError(f"{where}: expected a value or {{}}, got nothing")
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, child in items:
        _refuse_nulls(child, f"{where}.{key}".lstrip("."))


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; what is read here must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise MmqError(f"expected each key once, got {key!r} twice (line {line})")
        return super().construct_mapping(node, deep)


def parse_text(text: str, noun: str) -> object:
    """Plain data from YAML or JSON; an empty text is an empty mapping. Raises MmqError."""
    try:
        return {} if not text.strip() else yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise MmqError(f"{noun}: expected YAML or JSON, got {detail}") from error


def _explain(item: Any, schema: type[BaseModel]) -> str:
    """One pydantic error as "where: expected ..., got ...", with a suggestion for unknown keys."""
    location = tuple(item["loc"])
    where = ".".join(str(part) for part in location if not str(part).startswith("function-"))
    if item["type"] == "extra_forbidden":
        known = _keys_at(location[:-1], schema)
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        return f"{where}: unknown key, {hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should be", "expected")
    if "got " in message:
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, got {json.dumps(item['input'], default=str)}"


def _keys_at(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The schema class inside an annotation such as ``tuple[Override, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None
