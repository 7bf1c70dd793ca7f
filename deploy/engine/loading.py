"""Whether the Python package of a backend can be loaded: one that is installed may still lack its libraries or a driver."""

import importlib
import importlib.util

from deploy.engine.logger import one_line


def why_not_loaded(module: str, install: str) -> str | None:
    """The reason in one line why `module` cannot be imported, or None. `install`: the command that installs it."""
    if importlib.util.find_spec(module) is None:
        return f"the package {module} is not installed ({install})"
    try:
        importlib.import_module(module)
    except Exception as error:  # of any type: what a library raises when it cannot find another is its own affair
        said = one_line(str(error))[:200]
        return f"the package {module} is installed but cannot be loaded ({type(error).__name__}: {said}): {install}"
    return None
