"""The proof that an engine is INT8, with what the engine tells of its layers kept where it fails."""

from collections.abc import Iterable
from pathlib import Path

from deploy.engine.audit import Audit, audit, require_int8
from deploy.engine.backends import Built
from deploy.errors import ContractError
from deploy.package import layers_beside, write_json


def proven(
    built: Built, planned: Iterable[str], attention: Iterable[str], final: Path, every: bool, half: bool = True
) -> Audit:
    """Return the audit of an engine, of which `planned` and `attention` are to run in INT8.

    `every`: all of them. `half`: the others in FP16.

    Raises ContractError if they do not; what the engine tells of its layers then lies beside `final`, the package's folder.
    """
    found, beside = audit(built.kernels, planned, attention), layers_beside(final)
    try:
        require_int8(found, every, half)
    except ContractError as fault:
        beside.parent.mkdir(parents=True, exist_ok=True)
        write_json(beside, built.layers_json())
        raise ContractError(f"{fault}; what the engine tells of its layers is in '{beside}'") from None
    beside.unlink(missing_ok=True)  # of an earlier engine
    return found
