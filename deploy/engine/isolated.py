"""Builds an engine in a process of its own: a builder that crashes is then one line, and the run cleans up after itself."""

import importlib
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import onnx

from calib.errors import UserError
from deploy.engine.backends import Built
from deploy.engine.build import Profile
from deploy.engine.builder import DEFAULT, Builder
from deploy.host import return_memory


class CrashError(Exception):
    """A process ended without an answer; the message is how: the name of a signal, or its exit code."""


def _answer(parent: Connection) -> None:
    """Receive a function and its arguments, and send (whether it returned, what it returned or raised).

    What native code prints goes to stderr: stdout is the caller's, who may have promised JSON on it.
    """
    os.dup2(2, 1)
    function, arguments = parent.recv()
    try:
        answer = (True, function(*arguments))
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))  # pickle drops the traceback
        answer = (False, error)
    try:
        if not answer[0]:
            pickle.loads(pickle.dumps(answer))  # an exception may not be made again from what is pickled
        parent.send(answer)
    except (BrokenPipeError, ConnectionResetError):  # who asked is gone
        return
    except Exception:  # whatever the classes of others raise
        parent.send((False, RuntimeError(f"{type(answer[1]).__name__}: {answer[1]}")))


def _signal(number: int) -> str:
    """The name of a signal; real-time ones have none."""
    names = {each.value: each.name for each in signal.Signals}
    return names.get(number, f"signal {number}")


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which reaches the whole group: who started them ends them."""
    resource_tracker.ensure_running()  # starting it, which multiprocessing else does at the first process, lifts the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a new process, which is gone when this returns. The function lies in a module.

    Raises what the function raises, and CrashError if the process ends without an answer.
    """
    context = multiprocessing.get_context("spawn")  # no copy of threads and of CUDA's state
    own, others = context.Pipe()
    # start() would wait for ever to write large arguments to a process that ends before it reads them
    process = context.Process(target=_answer, args=(others,), daemon=True)
    with _deaf_children():
        process.start()
    others.close()
    try:
        own.send((function, arguments))
        returned, answer = own.recv()
    except (EOFError, OSError):  # the pipe ended, perhaps in the middle of the answer
        process.join()
        code = process.exitcode or 0
        raise CrashError(_signal(-code) if code < 0 else f"exit code {code}") from None
    finally:
        process.kill()
        process.join()
        own.close()
    if not returned:
        raise answer
    return answer


def _build(backend: str, model: bytes, profile: Profile, sms: tuple[int, ...] | None, builder: Builder) -> Built:
    return importlib.import_module(backend).build(onnx.load_from_string(model), profile, sms, builder)


def build_apart(
    backend: ModuleType,
    model: onnx.ModelProto,
    profile: Profile,
    sms: tuple[int, ...] | None,
    builder: Builder = DEFAULT,
) -> Built:
    """What `backend.build` returns, from a process of its own. Raises UserError also if that process crashes."""
    return_memory()  # a builder takes several times the size of its graph
    try:
        return isolated(_build, backend.__name__, model.SerializeToString(), profile, sms, builder)
    except CrashError as crash:
        likely = " (out of memory is the usual cause)" if str(crash) == "SIGKILL" else ""
        raise UserError(
            f"{backend.NAME} {backend.version()} crashed while it built the engine: {crash}{likely}; try a smaller "
            f"MAX_BATCH=, another TARGET=, or another version"
        ) from None
