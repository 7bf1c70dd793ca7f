"""What "as good as float" means, one file per task: the measures beside the SQNR that all outputs share.

A task has `measures(reference, output, task, labels)`, which compares a network's outputs with the float network's and
returns fields of `Fidelity`, and says by `TOP1` whether an agreement of top-1 results is one of them. The name of the file
is the name of the task (calib/task.py).
"""

import importlib
import pkgutil
from typing import Any


def task_module(name: str) -> Any:
    """Return the module of the task `name`. Raises ValueError if there is none."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in names:
        raise ValueError(f"unknown task '{name}': expected {', '.join(names)}")
    return importlib.import_module(f"{__name__}.{name}")
