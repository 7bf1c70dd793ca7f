"""Clocks, power and temperature of the GPU that engines run on, as the driver tells them while something is timed.

A speed without its clock cannot be compared with another: a GPU that is hot, or at its limit of power, lowers its clocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, Self

from deploy.gpu import CudaError, NoGpuError, answer, started_driver

PCI_ADDRESS = 13  # bytes of a PCI bus id with its terminator
# Bits of the reasons why clocks are lower than they could be (nvml.h, nvmlClocksEventReasons)
SLOWED = {
    0x4: "limit of power", 0x8: "hardware slowdown", 0x20: "temperature", 0x40: "temperature (hardware)",
    0x80: "power brake",
}  # fmt: skip
NUMBERS = ("sm_clock", "memory_clock", "power", "temperature")
CLOCKS_SET = 0x2  # nvidia-smi -lgc or -ac: somebody chose the clocks


@dataclass(frozen=True)
class GpuState:
    """One look at a GPU. Clocks in MHz, `power` in watts, `temperature` in degrees Celsius; None: the driver does not tell.

    `slowed`: why clocks are lowered. `clocks_set`: whether somebody chose them.
    """

    sm_clock: int | None
    memory_clock: int | None
    power: float | None
    temperature: int | None
    slowed: tuple[str, ...] | None
    clocks_set: bool | None


class GpuMonitor:
    """Inside its `with`, `look()` keeps the state of the first visible GPU; `reason` says why it cannot."""

    def __init__(self) -> None:
        self.states: list[GpuState] = []
        self.reason: str | None = None

    def __enter__(self) -> Self:
        try:
            self.nvml: ModuleType | None = _started_nvml()
        except NoGpuError as error:
            self.nvml, self.reason = None, str(error)
            return self
        try:
            self.device = self.nvml.device_get_handle_by_pci_bus_id_v2(_pci_address())
        except (self.nvml.NvmlError, RuntimeError, NoGpuError) as error:
            self.reason = f"the driver does not find the GPU for its clocks ({error})"
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if self.nvml is not None:
            self.nvml.shutdown()

    def look(self) -> None:
        """Keep what the GPU is doing now."""
        if self.reason is not None or self.nvml is None:
            return
        nvml, asked = self.nvml, self._asked
        clock, reasons = nvml.ClockType, asked("device_get_current_clocks_event_reasons")
        self.states.append(
            GpuState(
                asked("device_get_clock_info", clock.SM),
                asked("device_get_clock_info", clock.MEM),
                _scaled(asked("device_get_power_usage"), 1e-3),
                asked("device_get_temperature_v", nvml.TemperatureSensors.GPU),
                None if reasons is None else tuple(name for bit, name in SLOWED.items() if reasons & bit),
                None if reasons is None else bool(reasons & CLOCKS_SET),
            )
        )

    def summary(self) -> dict[str, Any]:
        """The states since the last summary as plain values: lowest and highest of each, and why clocks were lowered."""
        if self.reason is not None or self.nvml is None:
            return {"unknown": self.reason}
        states, self.states = self.states, []
        told = [state.slowed for state in states if state.slowed is not None]
        return {
            **{name: _ends([getattr(state, name) for state in states]) for name in NUMBERS},
            "highest_sm_clock": self._asked("device_get_max_clock_info", self.nvml.ClockType.SM),
            "power_limit": _scaled(self._asked("device_get_enforced_power_limit"), 1e-3),
            "slowed": sorted({each for reasons in told for each in reasons}) if told else None,
            "clocks_set": any(state.clocks_set for state in states) if told else None,
            "looks": len(states),
        }

    def _asked(self, function: str, *arguments: Any) -> Any:
        """What NVML tells of the device; None where this GPU or driver does not support the question."""
        assert self.nvml is not None
        try:
            return getattr(self.nvml, function)(self.device, *arguments)
        except (self.nvml.NvmlError, RuntimeError):  # not supported; an older driver lacks the function
            return None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _ends(values: Sequence[float | None]) -> list[float] | None:
    """[lowest, highest] of the values that are known."""
    known = [value for value in values if value is not None]
    return [min(known), max(known)] if known else None


def _started_nvml() -> ModuleType:
    """`cuda.bindings.nvml`, initialised. Raises NoGpuError with the reason."""
    try:
        from cuda.bindings import nvml
    except ImportError:
        raise NoGpuError("this version of cuda-bindings has no NVML") from None
    try:
        nvml.init_v2()
    except (nvml.NvmlError, RuntimeError) as error:  # a Jetson has no such library
        raise NoGpuError(f"NVML cannot be loaded ({str(error).splitlines()[0]})") from None
    return nvml


def _pci_address() -> str:
    """Where the first visible GPU is, which NVML, unlike CUDA, does not count by CUDA_VISIBLE_DEVICES."""
    driver = started_driver()
    try:
        device = answer(driver, "cuDeviceGet", 0)
        return bytes(answer(driver, "cuDeviceGetPCIBusId", PCI_ADDRESS, device)).split(b"\0")[0].decode()
    except CudaError as error:
        raise NoGpuError(str(error)) from None
