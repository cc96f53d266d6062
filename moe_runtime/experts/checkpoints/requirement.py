"""Whether transformers is installed, in a version whose internals are known here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from moe_runtime.errors import ConfigError

#: The minor version that ``internals.py`` was written against; pyproject.toml pins the same.
SUPPORTED_SERIES = "5.23"


def check_transformers() -> None:
    """Check that transformers can be used.

    Raises:
        ConfigError: If it is not installed, or in another series than the supported one.
    """
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ConfigError(
            "Hugging Face models need transformers, which is not installed; `pip install 'moe-runtime[transformers]'`"
        ) from None
    if found.split(".")[:2] != SUPPORTED_SERIES.split("."):
        raise ConfigError(
            f"expected transformers {SUPPORTED_SERIES}.*, whose internals are known, found {found}; "
            f"`pip install 'transformers~={SUPPORTED_SERIES}.0'`"
        )
