"""The configuration's reference, as Markdown, written from the models: ``docs/configuration.md``."""

from __future__ import annotations

import json
import types
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from moe_runtime.config.runtime import RuntimeConfig
from moe_runtime.config.strict import NAME_PATTERN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pydantic.fields import FieldInfo

_TYPE_NAMES: Mapping[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "`true` or `false`",
    type(None): "`null`",
    Any: "anything",
}

_INTRODUCTION = """\
# Configuration

<!-- Written by `make docs` from the models in moe_runtime/config and moe_runtime/experts. Do not edit. -->

One YAML file describes a runtime. Its paths are relative to the file. A key that is not in this page is an
error, and so is a key written twice; `moe-runtime validate CONFIG.yaml` checks everything without starting
anything and says, for every mistake, which key it is, what was expected and what was found.

```yaml
name: digits-demo
device: auto
plug_ins: [moe-runtime-example-expert]
layers:
  digits:
    item_shape: [64]
    gate: {kind: linear, weights: gate.safetensors}
    policy: {kind: top_k, k: 2, normalize: before_drop}
    capacity: {factor: 1.25, min: 4, drop: position, overflow: drop}
    residual: none
    timeout_ms: 2000
    experts:
      - kind: conv
        name: conv-0
        weights: conv-0.safetensors
        view: {shape: [1, 8, 8]}
        options: {channels: 16, out_features: 10}
        resources: {num_cpus: 0.1, num_gpus: 0}
      - {kind: feed_forward, count: 1, options: {hidden_features: 128, out_features: 10}}
router: {replicas: 1, max_batch_tokens: 4096, max_wait_ms: 2.0, max_queued_tokens: 65536, address: "127.0.0.1:50051"}
```
"""


def configuration_page(kinds: Mapping[str, type[BaseModel]]) -> str:
    """The page ``docs/configuration.md``.

    Args:
        kinds: Model of the ``options`` of each built-in kind of expert, by the kind's name.
    """
    lines = [_INTRODUCTION]
    for path, model in _blocks("", RuntimeConfig):
        lines += _section(_heading(path, model), model, level=2)
    lines += ["## The options of the built-in kinds", ""]
    lines += ["What `layers.<name>.experts.<n>.options` takes. Plug-ins document their own.", ""]
    for name, options in kinds.items():
        lines += _section(f"`{name}`", options, level=3)
    return "\n".join(lines).rstrip() + "\n"


def _blocks(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every block of the configuration under its path, from the top."""
    yield path, model
    for name, field in model.model_fields.items():
        inner = ".".join(part for part in (path, name) if part)
        for step, block in _nested(field.annotation):
            yield from _blocks(inner + step, block)


def _nested(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """Models within an annotation, each with the steps from the key to it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "", annotation
        return
    steps: Mapping[Any, str] = {dict: ".<name>", list: ".<n>"}
    step = steps.get(get_origin(annotation), "")
    for inner in get_args(annotation):
        for rest, model in _nested(inner):
            yield step + rest, model


def _heading(path: str, model: type[BaseModel]) -> str:
    kind = model.model_fields.get("kind")
    tags = get_args(kind.annotation) if kind is not None else ()
    return (f"`{path}`" if path else "The top level") + (f", kind `{tags[0]}`" if tags else "")


def _section(title: str, model: type[BaseModel], *, level: int) -> list[str]:
    description = " ".join((model.__doc__ or "").split()).replace("``", "`")
    lines = [f"{'#' * level} {title}", "", description, ""]
    if not model.model_fields:
        return [*lines, "No keys.", ""]
    lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [_row(name, field) for name, field in model.model_fields.items()]
    return [*lines, ""]


def _row(name: str, field: FieldInfo) -> str:
    value = "name" if _names(field.metadata) else _type_name(field.annotation)
    limits = ", ".join(_limits(field))
    meaning = field.description or ("Chooses this block's form." if name == "kind" else "")
    cells = (f"`{name}`", f"{value}, {limits}" if limits else value, _default(field), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        constraints = [constraint for inner in annotation.__metadata__ for constraint in inner.metadata]
        return "name" if _names(constraints) else _type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(argument) for argument in arguments))
    if origin is Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if origin is list:
        return f"list of {_type_name(arguments[0])}s"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_type_name(arguments[0])}"
    if origin is tuple:
        return "[" + ", ".join(_type_name(argument) for argument in arguments) + "]"
    if origin is dict:
        return f"mapping of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    return _TYPE_NAMES.get(annotation, str(annotation))


def _names(constraints: Iterable[Any]) -> bool:
    """Whether the constraints are those of ``Name``."""
    return any(getattr(constraint, "pattern", None) == NAME_PATTERN for constraint in constraints)


def _limits(field: FieldInfo) -> Iterator[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for constraint in field.metadata:
        for attribute, sign in signs.items():
            bound = getattr(constraint, attribute, None)
            if bound is not None:
                yield f"{sign} {bound}"
        if getattr(constraint, "min_length", None):
            yield f"{constraint.min_length} or more"
        pattern = getattr(constraint, "pattern", None)
        if pattern is not None and pattern != NAME_PATTERN:
            yield f"matches `{pattern}`"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    if isinstance(value, BaseModel):
        return "its defaults"
    text = json.dumps(value).strip('"')
    return f"`{text}`"
