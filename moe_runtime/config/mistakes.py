"""One line per mistake in a configuration: the key's path, what was expected, what was found.

Pydantic's own texts name Python types and the members of unions that it tried; a configuration's author
knows neither.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from moe_runtime.config.strict import NAME_PATTERN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

_MAX_FOUND_CHARS = 80
_MAX_FOUND_BITS = 4096
#: A validator of a whole block names the key at fault first: ``policy.k: expected ...``.
_KEY_FIRST = re.compile(r"^([a-z_][a-z0-9_]*(?:\.[a-z0-9_]+)*): ")


def describe_mistakes(
    error: ValidationError, *, model: type[BaseModel], at: str = "", shows_values: bool = True
) -> tuple[str, ...]:
    """One line per mistake that pydantic found in the input of ``model``.

    Args:
        error: What ``model.model_validate`` raised.
        model: The model that refused its input.
        at: Path of the model's block in the whole configuration; empty for all of it.
        shows_values: Whether lines say what was found; not where it may be a secret.

    Returns:
        Lines such as ``layers.digits.experts.0.optoins: unknown key; did you mean options?``, in the order
        of the models' fields. The alternatives of one value are one line.
    """
    expectations: dict[str, list[str]] = {}
    tails: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        place = _Place(model, detail["loc"])
        path, expected, tail = _describe(detail, place)
        path = ".".join(part for part in (at, path) if part)
        known = expectations.setdefault(path, [])
        alternative = expected.removeprefix("expected ") if known else expected
        if alternative not in known:
            known.append(alternative)
        tails[path] = tail if shows_values else ""
    return tuple(
        (f"{path}: " if path else "") + " or ".join(expected) + tails[path] for path, expected in expectations.items()
    )


def describe_mistake(detail: ErrorDetails, *, model: type[BaseModel]) -> str:
    """What was expected and found in one mistake of an input of ``model``, without the key's path."""
    _, expected, tail = _describe(detail, _Place(model, detail["loc"]))
    return expected + tail


def unknown_key(key: str, known: Sequence[str]) -> str:
    """What to say about a key that is not among the known ones; suggests the nearest."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    return f"unknown key; known are {', '.join(known)}" if known else "unknown key; there are none here"


def found(value: object) -> str:
    """How a message names the value that it found: the value itself, shortened."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, value))}" if value else "an empty mapping"
    if isinstance(value, int) and value.bit_length() > _MAX_FOUND_BITS:
        # Python refuses to write out the largest integers.
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _MAX_FOUND_CHARS else text[: _MAX_FOUND_CHARS - 3] + "..."


class _Place:
    """Where a mistake is: pydantic's location without the members of unions, and the model that holds it."""

    def __init__(self, model: type[BaseModel], location: Sequence[int | str]) -> None:
        self.owner: type[BaseModel] | None = model
        self._parts: list[str] = []
        annotation: Any = model
        for part in location:
            if not _is_union_member(annotation, part):
                self._parts.append(str(part))
                self.owner = _model_of(annotation)
            annotation = _step(annotation, part)
        self._annotation = annotation

    @property
    def path(self) -> str:
        return ".".join(part for part in self._parts if part != "[key]")

    @property
    def key(self) -> str:
        return self._parts[-1] if self._parts else ""

    @property
    def tags(self) -> tuple[str, ...]:
        """The kinds that the union of models at this place has."""
        models = [member for member in _members(self._annotation) if _is_model(member)]
        return tuple(tag for model in models for tag in get_args(model.model_fields["kind"].annotation))

    @property
    def field_description(self) -> str:
        """What the model says of the field at this place; empty when it says nothing."""
        field = self.owner.model_fields.get(self.key) if self.owner is not None else None
        return (field.description or "").rstrip(".") if field is not None else ""


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, aliases and metadata taken off."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(member for arg in get_args(annotation) for member in _members(arg))
    return (annotation,)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    models = [member for member in _members(annotation) if _is_model(member)]
    return models[0] if len(models) == 1 else None


def _tagged(annotation: Any, tag: int | str) -> type[BaseModel] | None:
    """The member of a union of models that ``kind: tag`` names; None where the annotation is no such union."""
    models = [member for member in _members(annotation) if _is_model(member)]
    if len(models) < 2:
        return None
    for model in models:
        field = model.model_fields.get("kind")
        if field is not None and tag in get_args(field.annotation):
            return model  # type: ignore[no-any-return]  # _is_model has narrowed it
    return None


def _is_union_member(annotation: Any, part: int | str) -> bool:
    """Whether a part of a location names the alternative that pydantic tried, and no key."""
    members = [member for member in _members(annotation) if member is not type(None)]
    is_plain_union = len(members) > 1 and not any(_is_model(member) for member in members)
    return is_plain_union or _tagged(annotation, part) is not None


def _step(annotation: Any, part: int | str) -> Any:
    """The annotation of what a part of a location leads to; None where the models say no more."""
    tagged = _tagged(annotation, part)
    if tagged is not None:
        return tagged
    for member in _members(annotation):
        if _is_model(member):
            field = member.model_fields.get(str(part))
            return field.annotation if field is not None else None
        if get_origin(member) is dict:
            return get_args(member)[1]
        if get_origin(member) in (list, tuple):
            return get_args(member)[0]
    return None


def _literal(detail: ErrorDetails, _place: _Place) -> str:
    return detail["ctx"]["expected"].replace("'", "")  # type: ignore[no-any-return]  # pydantic: a string


def _at_least(detail: ErrorDetails, _place: _Place) -> str:
    return f"at least {detail['ctx']['ge']}"


def _pattern(detail: ErrorDetails, _place: _Place) -> str:
    if detail["ctx"]["pattern"] == NAME_PATTERN:
        return "a name: a letter or digit, then at most 62 letters, digits and _ . -"
    return f"a text that matches {detail['ctx']['pattern']}"


def _missing(place: _Place) -> str:
    description = place.field_description
    return description[:1].lower() + description[1:] if description else "a value"


_EXPECTED: Mapping[str, str | Callable[[ErrorDetails, _Place], str]] = {
    "literal_error": _literal,
    "greater_than_equal": _at_least,
    "greater_than": lambda detail, _: f"more than {detail['ctx']['gt']}",
    "less_than_equal": lambda detail, _: f"at most {detail['ctx']['le']}",
    "less_than": lambda detail, _: f"less than {detail['ctx']['lt']}",
    "too_short": lambda detail, _: f"{detail['ctx']['min_length']} or more entries",
    "too_long": lambda detail, _: f"at most {detail['ctx']['max_length']} entries",
    "string_pattern_mismatch": _pattern,
    "finite_number": "a finite number",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "invalid_key": "a text as key",
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
}


def _describe(detail: ErrorDetails, place: _Place) -> tuple[str, str, str]:
    """Path, what was expected, and the rest of the line."""
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = [] if place.owner is None else list(place.owner.model_fields)
        return place.path, unknown_key(place.key, known), ""
    if kind == "value_error":
        return _own_words(str(detail["ctx"]["error"]), place)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_tag(detail, place)
    if kind == "missing":
        return place.path, f"missing; expected {_missing(place)}", ""
    expected = _EXPECTED.get(kind)
    if expected is None:
        return place.path, detail["msg"][:1].lower() + detail["msg"][1:], f"; found {found(detail['input'])}"
    words = expected if isinstance(expected, str) else expected(detail, place)
    return place.path, f"expected {words}", f", found {found(detail['input'])}"


def _own_words(message: str, place: _Place) -> tuple[str, str, str]:
    key_first = _KEY_FIRST.match(message)
    if key_first is None:
        return place.path, message, ""
    path = ".".join(part for part in (place.path, key_first.group(1)) if part)
    return path, message[key_first.end() :], ""


def _wrong_tag(detail: ErrorDetails, place: _Place) -> tuple[str, str, str]:
    path = f"{place.path}.kind"
    if detail["type"] == "union_tag_invalid":
        tags = detail["ctx"]["expected_tags"].replace("'", "")
        return path, f"expected one of {tags}", f", found {found(detail['ctx']['tag'])}"
    kinds = ", ".join(place.tags)
    return path, f"missing; expected one of {kinds}", ""
