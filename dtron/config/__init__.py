"""A run's configuration: TOML and command line in, one checked, typed tree out."""

from dtron.config.cli import HelpRequested, help_text
from dtron.config.load import changed_keys, digest, flatten, load, read, replace, to_toml
from dtron.config.sections import Config

__all__ = [
    "Config",
    "HelpRequested",
    "changed_keys",
    "digest",
    "flatten",
    "help_text",
    "load",
    "read",
    "replace",
    "to_toml",
]
