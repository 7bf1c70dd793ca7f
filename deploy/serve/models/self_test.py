"""Whether the server's tensors arrive in Python as they were sent.

The Python backend of Triton before 24.11 reads numpy 2 arrays wrongly: tensors of size 0 go out, garbage comes in, and the
answer has HTTP status 200. A model that starts with this test does not load there.
"""

from types import ModuleType

import numpy as np

KNOWN = tuple(np.arange(-5, 7, dtype=dtype).reshape(3, 4) for dtype in (np.float32, np.int64))


def require_sound_tensors(pb_utils: ModuleType) -> None:
    """Raise RuntimeError unless known tensors come back from the module of the Python backend as they went in.

    They go through DLPack once: a tensor that was made of an array returns that very array, which would show nothing.
    """
    for known in KNOWN:
        sent = pb_utils.Tensor("known", known)
        came_back = pb_utils.Tensor.from_dlpack("known", sent.to_dlpack()).as_numpy()
        if np.shape(came_back) != known.shape or not np.array_equal(came_back, known):
            raise RuntimeError(
                f"this Python backend returns other numbers than it was given (numpy {np.__version__}): expected the "
                f"same; install 'numpy<2' in its environment, or serve with Triton 24.11 or newer"
            )
