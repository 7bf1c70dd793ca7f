"""The options of all ONNX Runtime sessions: with them, results do not depend on the processor."""

import base64
import functools
import zlib
from typing import Any

DEPTH, WIDTH = 64, 16  # of the product that tells whether a processor's INT8 kernels are exact
LARGEST = 127
EXACT_SUMS = "session.x64quantprecision"
# Idle threads of a session spin for a while, and slow down another session that runs meanwhile: here several run in turn.
NO_SPINNING = "session.force_spinning_stop"


def _options(threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry(NO_SPINNING, "1")
    return options


# A serialized ONNX graph, so that the package onnx is not needed where a network only runs: x (1, DEPTH) times a weight
# (DEPTH, WIDTH) of LARGEST, both in INT8 with scale 1.
PRODUCT = (
    "eNrj4LJ6xsWlyMVYwcWcn5fKxVKVWpQvxFioxBdYmphXklmV6pOZl5pYxKXCxViIrISpolBJwCW1EFWVORdbeWpmekYJFwtQaTEXK0htsRBjOaZaLW4u"
    "lsSKzGIJxgWMTFxCXEADuRjLhRgrldh8E0t8S3OE2AuK8lNKk0u0eAUYnUBWe7EwMDTYa3ELMDuBHeHFyKA1kYPDgUMAKAK12KuBo34UjIJRMGKBlg+w"
    "QGB0ApdAXg6gIoMSrCULLl4gJZmXAAMaiBIGlp1CfFw8HIxCHFxMHIxA7JAEFKxEExRwYuFiEBAGAJOJS7w="
)


def product_graph() -> bytes:
    """The serialized graph of `PRODUCT`."""
    return zlib.decompress(base64.b64decode(PRODUCT))


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime's default INT8 kernels get the largest sum of products wrong on this processor.

    Those for processors without VNNI add two products in 16 bits. `EXACT_SUMS` selects others, which are exact there and
    slower than VNNI's elsewhere.
    """
    import numpy as np
    import onnxruntime as ort

    session = ort.InferenceSession(product_graph(), _options(1), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, DEPTH), LARGEST, np.float32)})
    return not np.array_equal(found, np.full((1, WIDTH), LARGEST * LARGEST * DEPTH))


def ort_options(threads: int) -> Any:
    """`SessionOptions` for `threads` threads that log nothing but errors, with exact sums of INT8 products."""
    options = _options(threads)
    if saturates():
        options.add_session_config_entry(EXACT_SUMS, "1")
    return options
