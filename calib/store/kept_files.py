"""Files that hold a result for later: whole or absent, and known by what is in them."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what is there at the end takes the place of `path` in one step. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        fresh = Path(scratch) / path.name
        yield fresh
        with fresh.open("rb") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the content does
        fresh.replace(path)


def tensors_sha256(tensors: "Mapping[str, Tensor]", text: str = "") -> str:
    """Hex digest of `text` and of the tensors' names, types, shapes and values."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def nets_sha256(nets: "Mapping[str, nn.Module]") -> str:
    """Hex digest of the parameters and buffers of named networks."""
    return tensors_sha256(
        {f"{kind}.{name}": value for kind, net in nets.items() for name, value in net.state_dict().items()}
    )
