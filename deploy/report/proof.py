"""How many layers are proven to run in INT8, and how many are planned to."""

from deploy.engine.backends import TENSORRT_RTX

PLANNED_ONLY = TENSORRT_RTX  # the backend whose convolutions are planned INT8 and no more


def proven_and_planned(backend: str, planned: int, lost: int, convolutions: int) -> tuple[int, int]:
    """The layers proven INT8 by the engine's kernels, and those only planned where the kernels do not tell.

    Of an audit (deploy/engine/audit.py): the number of `planned` layers, of those `lost`, and of INT8 `convolutions`.
    """
    unproven = convolutions if backend == PLANNED_ONLY else 0
    return planned - lost - unproven, unproven
