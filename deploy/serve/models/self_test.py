"""Whether the server's tensors arrive in Python as they were sent.

The Python backend of Triton before 24.11 reads numpy 2 arrays wrongly: tensors of size 0 go out, garbage comes in, and the
answer has HTTP status 200. A model that starts with this test does not load there.
"""

from types import ModuleType

import numpy as np

KNOWN = np.arange(12, dtype=np.float32).reshape(3, 4) - 5


def require_sound_tensors(pb_utils: ModuleType) -> None:
    """Raise RuntimeError unless a known tensor comes back from the module of the Python backend as it went in.

    It goes through DLPack once: a tensor that was made of an array returns that very array, which would show nothing.
    """
    sent = pb_utils.Tensor("known", KNOWN)
    came_back = pb_utils.Tensor.from_dlpack("known", sent.to_dlpack()).as_numpy()
    if np.shape(came_back) != KNOWN.shape or not np.array_equal(came_back, KNOWN):
        raise RuntimeError(
            f"this Python backend returns other numbers than it was given (numpy {np.__version__}): expected the same; "
            f"install 'numpy<2' in its environment, or serve with Triton 24.11 or newer"
        )
