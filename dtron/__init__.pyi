"""The public names for type checkers; `dtron.train` is a package at run time, which calls this function."""

from dtron.config import Config as Config
from dtron.errors import UserError as UserError
from dtron.library import Run as Run
from dtron.library import load_config as load_config
from dtron.library import load_model as load_model
from dtron.library import train as train

__version__: str
