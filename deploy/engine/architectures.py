"""GPU architectures by compute capability, 89 for 8.9, and which of them TensorRT-RTX runs on.

An engine without SM= names 8.0, 8.6, 8.9, 12.0, 12.1 and what follows. On an H100 (9.0) every engine was refused, also one
built for that GPU (docs/gpu.md); 8.7, 10.x and 11.0, which the library does not name either, were not tried.
"""

from deploy.gpu import NoGpuError, gpu

RTX_SMS = (75, 80, 86, 89, 120, 121)  # what an engine of TensorRT-RTX can be built for
RTX_DEFAULT = ("SM80", "SM86", "SM89", "SM120+")  # what one is for that was built for none of them in particular


def runs_on(target: str, sm: int) -> bool:
    """Whether an engine for `target`, "SM89" or "SM120+" for this and later ones, runs on compute capability `sm`."""
    wanted = int(target.removeprefix("SM").removesuffix("+"))
    return sm >= wanted if target.endswith("+") else sm == wanted


def rtx_supports(sm: int) -> bool:
    """Whether TensorRT-RTX runs on compute capability `sm` at all."""
    return sm in RTX_SMS or sm > max(RTX_SMS)


def why_not_rtx() -> str | None:
    """The reason why TensorRT-RTX runs no engine on this machine's GPU, or None; of a machine without one, None."""
    try:
        here = gpu()
    except NoGpuError:
        return None
    if rtx_supports(here.compute_capability):
        return None
    return (
        f"TensorRT-RTX does not support the {here.name}, compute capability {here.compute_capability / 10:.1f}, whatever an "
        f"engine was built for: install TensorRT and build with TARGET=tensorrt"
    )
