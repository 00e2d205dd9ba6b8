"""Packages that only some of the work needs: imported when it comes to that."""

from importlib import import_module
from types import ModuleType

from .errors import SettingsError


def extra(module: str, name: str) -> ModuleType:
    """The module, which the extra `name` of pyproject.toml brings. Raises SettingsError that says how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise SettingsError(f"the package {module.partition('.')[0]} is needed for this, and is not here ({error})",
                            fix=f"pip install 'rwkv_nb[{name}]'") from error
