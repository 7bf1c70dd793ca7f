"""The options of all ONNX Runtime sessions: with them, results do not depend on the processor."""

from typing import Any


def ort_options(threads: int) -> Any:
    """`SessionOptions` for `threads` threads that log nothing but errors."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # processors without VNNI saturate the sum of two INT8 products at 16 bits: this selects kernels that are exact there
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options
