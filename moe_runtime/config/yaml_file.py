"""Reads and writes YAML; the only module that needs PyYAML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Hashable
    from pathlib import Path


_LINE_WIDTH = 120


def read_yaml(path: Path) -> Any:
    """The plain values in a YAML file: mappings, lists, texts, numbers, booleans, null.

    Raises:
        ConfigError: If the file cannot be read, is not UTF-8, is not one YAML document, or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: there is no such file") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path.name}: expected UTF-8 text, found other bytes at offset {exc.start}") from exc
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    return parse_yaml(text, origin=path.name)


def parse_yaml(text: str, *, origin: str) -> Any:
    """The plain values in a YAML document; JSON is one, too.

    Args:
        text: The document.
        origin: How messages name it.

    Raises:
        ConfigError: If it is not one YAML document, or repeats a key.
    """
    try:
        # A loader of plain values: safe, and stricter than SafeLoader.
        return yaml.load(text, Loader=_UniqueKeyLoader)  # nosec B506  # a SafeLoader
    except yaml.MarkedYAMLError as exc:
        raise ConfigError(f"{origin}: {_in_one_line(exc)}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{origin}: expected a few levels of nesting, found too many to read") from exc
    except ValueError as exc:
        # PyYAML passes on what int() and date() say, such as of too many digits.
        raise ConfigError(f"{origin}: a value cannot be read: {exc}") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"{origin}: {' '.join(str(exc).split())}") from exc


def as_yaml(data: object) -> str:
    """A YAML document of plain values, keys in their order, the innermost blocks in a line each."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=_LINE_WIDTH, default_flow_style=None)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key written twice; YAML asks for it, PyYAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first_lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if key in first_lines:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key!r} is already in line {first_lines[key]}; write it once",
                    problem_mark=key_node.start_mark,
                )
            first_lines[key] = line
        return super().construct_mapping(node, deep)


def _in_one_line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    reason = ", ".join(part for part in (error.problem, error.context) if part)
    return place + (reason or "not valid YAML")
