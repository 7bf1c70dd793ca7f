"""Networks with other inputs than one image: which arrays they take, and whether they can read all of them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.errors import UserError
from calib.hooks import input_hooks
from calib.images.samples import first_samples, inputs_from_file, samples_from_file
from calib.inputs import Inputs
from calib.structure.trace import Trace


def inputs_told_by(calib: str | None) -> Callable[[], Inputs] | None:
    """Return what reads the names and types of inputs from the file `calib`; None for anything but a .npz file."""
    return partial(inputs_from_file, Path(calib)) if calib and calib.lower().endswith(".npz") else None


def two_samples(calib: str, inputs: Inputs) -> Tensor:
    """Return two rows of the file `calib`, float32 (2, N). Raises UserError for values that cannot be computed with."""
    return torch.from_numpy(first_samples(samples_from_file(Path(calib), inputs), 2))


def require_used(net: nn.Module, inputs: Inputs, sample: Tensor) -> None:
    """Raise UserError if the forward pass of `net` reads one of its `inputs` nowhere; `sample`: a row (1, N) of them."""
    given = [node for node in Trace(net, sample).nodes if node.op == "placeholder"][-len(inputs.each) :]
    for name, node in zip(inputs.names, given, strict=True):
        if not node.users:
            raise UserError(
                f"{type(net).__name__} does not use its input '{name}': expected inputs that its output depends on; leave "
                f"'{name}' out of the file"
            )


@contextmanager
def ids_in_embeddings(net: nn.Module) -> Iterator[None]:
    """Raise UserError where an embedding of `net` is asked for a row that it does not have."""

    def check(name: str, embedding: nn.Module, ids: Tensor) -> None:
        rows = len(embedding.get_parameter("weight"))
        wrong = ids[(ids < 0) | (ids >= rows)]
        if wrong.numel():
            raise UserError(
                f"the embedding '{name}' has {rows} rows and is asked for row {int(wrong.flatten()[0])}: expected ids from "
                f"0 to {rows - 1}; give the ids of the vocabulary that the network was trained with"
            )

    embeddings = [name for name, module in net.named_modules() if isinstance(module, nn.Embedding)]
    with input_hooks(net, embeddings, check):
        yield


def require_readable(net: nn.Module, inputs: Inputs, batches: Iterable[Tensor]) -> None:
    """Run `net` on all `batches` (B, N) if it takes whole numbers, which may lie outside its tables.

    Raises UserError for those that do.
    """
    if all(one.dtype in ("float32", "bool") for one in inputs.each):
        return
    with torch.inference_mode(), ids_in_embeddings(net):
        for rows in batches:
            try:
                net(rows)
            except (IndexError, RuntimeError) as error:
                raise UserError(
                    f"{type(net).__name__} cannot read all samples of {inputs.described()} "
                    f"({' '.join(str(error).split())[:200]}): expected whole numbers within its tables"
                ) from error
