"""A logger for TensorRT that records instead of printing hundreds of lines."""

from types import ModuleType
from typing import Any


def one_line(text: str) -> str:
    """`text` without line breaks and repeated spaces."""
    return " ".join(text.split())


def keeping_logger(trt: ModuleType) -> Any:
    """A logger of the module `trt` whose `errors` and `warnings` are the messages so far, each in one line."""

    class KeepingLogger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(one_line(message))
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(one_line(message))

    return KeepingLogger()


def first_error(logger: Any) -> str:
    """The first error that was logged, which later ones follow from."""
    return logger.errors[0] if logger.errors else "no reason given"
