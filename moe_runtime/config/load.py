"""A checked configuration from a YAML file, a mapping or a ``RuntimeConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_runtime.config.mistakes import describe_mistakes, found
from moe_runtime.config.runtime import RuntimeConfig
from moe_runtime.errors import ConfigError


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration, and the folder that its relative paths start from.

    Attributes:
        config: The checked configuration, as written: its paths are not resolved.
        base_dir: Absolute; the config file's folder, or the working directory where there was no file.
        origin: Begins every message about the configuration: the file's name and a colon; empty without a file.
    """

    config: RuntimeConfig
    base_dir: Path
    origin: str = ""

    def resolve(self, path: str) -> Path:
        """The absolute path of a file that the configuration names."""
        return self.base_dir / path

    def locate(self, source: str) -> str:
        """Where a file is that the configuration names: an address as it is, else its absolute path."""
        return source if is_uri(source) else str(self.resolve(source))


def without_presets(config: RuntimeConfig) -> dict[str, Any]:
    """The configuration in plain values that load to the same one, with the keys of its presets written out.

    What was left to its default stays left out. Paths stay as written: they are relative to the same folder.
    """
    return config.model_dump(mode="json", exclude_unset=True, exclude={"layers": {"__all__": {"preset"}}})


def is_uri(source: str) -> bool:
    """Whether a configuration names a file by an address, ``s3://bucket/name``, instead of a path."""
    return "://" in source


def load_config(source: str | Path | Mapping[str, Any] | RuntimeConfig) -> LoadedConfig:
    """The configuration that ``source`` holds, checked.

    Checks what can be known from the text alone: keys, types, ranges. Weights, plug-ins and experts'
    options are checked where they are built.

    Args:
        source: Path of a YAML file; a mapping of the same form; or a finished configuration, taken as it is.

    Raises:
        ConfigError: If the file cannot be read or the configuration cannot work; the message has one line
            per mistake, each with the file's name and the key's path.
    """
    if isinstance(source, RuntimeConfig):
        return LoadedConfig(config=source, base_dir=Path.cwd())
    if isinstance(source, Mapping):
        return LoadedConfig(config=_check(source, origin=""), base_dir=Path.cwd())
    if not isinstance(source, str | Path):
        raise ConfigError(f"configuration: expected a path or a mapping, found {type(source).__name__}")
    # The client imports this package's models where PyYAML is not installed.
    from moe_runtime.config.yaml_file import read_yaml

    path = Path(source).expanduser().absolute()
    origin = f"{path.name}: "
    return LoadedConfig(config=_check(read_yaml(path), origin=origin), base_dir=path.parent, origin=origin)


def _check(data: object, *, origin: str) -> RuntimeConfig:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{origin}expected a mapping with the key layers, found {found(data)}")
    try:
        return RuntimeConfig.model_validate(dict(data))
    except ValidationError as exc:
        lines = describe_mistakes(exc, model=RuntimeConfig)
        raise ConfigError("\n".join(origin + line for line in lines)) from exc
