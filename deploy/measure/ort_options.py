"""How every ONNX Runtime session here is set up, so that what it computes does not depend on the processor."""

from typing import Any


def ort_options(threads: int) -> Any:
    """`SessionOptions` for `threads` threads, with errors only in the log."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # processors without VNNI saturate the sum of two INT8 products at 16 bits: take the kernels that are exact there
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options
