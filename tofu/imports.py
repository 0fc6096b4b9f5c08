"""Import of the user's own code: `package.module:attribute`."""

import importlib
import os
import sys
from typing import Any


def import_object(name: str) -> Any:
    """Import `package.module:attribute`, also from the current folder, as flwr, uvicorn and flask do.

    The current folder is appended to the import path and not prepended, so that a project with its own `client.py` or
    `server.py` does not hide the packages of these names that Tofu imports later.

    Raises:
        Exception: whatever the user's module raises; AttributeError if it has no such attribute.

    Example:
        >>> import_object("math:sqrt")(9.0)
        3.0
    """
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
