"""A run's configuration: TOML and command line in, one checked, typed tree out."""

from dtron.config.cli import HelpRequested, help_text
from dtron.config.load import difference, fingerprint, flatten, load, to_toml
from dtron.config.sections import Config

__all__ = ["Config", "HelpRequested", "difference", "fingerprint", "flatten", "help_text", "load", "to_toml"]
