"""What "as good as float" means, one file per task: the measures beside the SQNR that all outputs share.

A task has `measures(reference, output, task, labels)`, which compares a network's outputs with the float network's and
returns fields of `Fidelity`, and `points_lost(fidelity)`, which tells what a limit in percent (MAX_DROP=1%) is about:
(percentage points, in words), or None in its place where nothing is counted. The name of the file is the name of the task
(calib/task.py).
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
