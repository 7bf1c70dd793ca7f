"""What happens in another process comes back as it would have happened here, and a crash is one line."""

import os
import signal
import stat
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from calib.errors import UserError
from deploy.engine.backends import Built
from deploy.engine.build import Profile
from deploy.engine.builder import Builder
from deploy.engine.isolated import CrashError, build_apart, isolated
from tests.docs.pages import ROOT
from tests.gpu.fake_cuda import printed
from tests.unit.deploy.engine.test_runner import graph


def double(x):
    return 2 * x, os.getpid()


def fails(kind, text):
    raise kind(text)


def dies(number):
    os.kill(os.getpid(), number)
    time.sleep(60)


def leaves(code):
    os._exit(code)


def hears():
    os.kill(os.getpid(), signal.SIGINT)
    return "nothing"


def prints(text):
    os.write(1, text)


class TwoError(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def fails_with_two():
    raise TwoError("this", "that")


def gives_a_lambda():
    return lambda: 1


def half_an_answer():
    """Write the length of an answer, as Connection does, and end."""
    for number in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                os.write(number, struct.pack("!i", 1000) + b"0")
        except OSError:
            continue
    os._exit(3)


def waits():
    time.sleep(600)


def test_a_value_comes_back_from_another_process():
    value, process = isolated(double, 21)
    assert value == 42
    assert process != os.getpid()
    assert not psutil.pid_exists(process)


@pytest.mark.parametrize(
    ("function", "message"), [(fails_with_two, "TwoError: this and that"), (gives_a_lambda, "function: <function")]
)
def test_what_cannot_come_back_is_told_in_words(function, message):
    with pytest.raises(RuntimeError, match=message):
        isolated(function)


def test_an_answer_that_ends_in_the_middle_is_a_crash():
    with pytest.raises(CrashError, match="exit code 3"):
        isolated(half_an_answer)


SCRIPT = """from deploy.engine.isolated import CrashError, isolated
try:
    isolated(len, b"0" * (1 << 22))
except CrashError as crash:
    print(crash)
"""


def test_a_script_that_starts_itself_again_is_a_crash_and_no_wait(tmp_path):
    """Without `if __name__ == "__main__"` the new process runs the script too, and ends before it reads its arguments."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "exit code 1\n"


@pytest.mark.parametrize("kind", [UserError, ZeroDivisionError])
def test_an_exception_comes_back_with_where_it_was_raised(kind):
    with pytest.raises(kind) as caught:
        isolated(fails, kind, "said")
    assert str(caught.value) == "said"
    assert "in fails" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("function", "argument", "text"),
    [(dies, signal.SIGSEGV, "SIGSEGV"), (dies, signal.SIGKILL, "SIGKILL"), (leaves, 3, "exit code 3")],
)
def test_a_crash_is_named(function, argument, text):
    with pytest.raises(CrashError, match=f"^{text}$"):
        isolated(function, argument)


def test_the_other_process_hears_no_interrupt_and_this_one_does():
    named = "tests.unit.deploy.engine.test_isolated"  # in a new process: the first call is the one at risk
    script = f"from deploy.engine.isolated import isolated; from {named} import hears; print(isolated(hears))"
    assert printed(script, None) == "nothing"
    with pytest.raises(KeyboardInterrupt):
        hears()


def test_an_interrupted_run_ends_the_other_process(monkeypatch):
    def interrupted(_self):
        raise KeyboardInterrupt

    monkeypatch.setattr("multiprocessing.connection.Connection.recv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        isolated(waits)
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


NAME = "made_up"


def version():
    return "1.0"


def build(model, profile, sms, builder):
    if sms == (0,):
        dies(signal.SIGKILL)
    return Built(
        model.graph.name.encode(),
        NAME,
        version(),
        ("SM1",),
        (),
        settings={"profile": profile.maximum, "builder": str(builder)},
    )


def test_an_engine_is_built_by_the_backend_in_another_process():
    backend = sys.modules[__name__]
    built = build_apart(backend, graph(), Profile(2, 4), None, Builder(level=1))
    assert (built.plan, built.settings) == (b"two", {"profile": 4, "builder": "level=1"})


def test_a_builder_that_crashes_is_one_line():
    with pytest.raises(UserError, match=r"^made_up 1\.0 crashed .*: SIGKILL \(out of memory .*\); try [^\n]*$"):
        build_apart(sys.modules[__name__], graph(), Profile(), (0,))


def test_a_backend_that_is_missing_is_a_bug():
    with pytest.raises(ModuleNotFoundError):
        build_apart(SimpleNamespace(__name__="no.such.backend", NAME=""), graph(), Profile(), None)


def test_what_native_code_prints_stays_out_of_stdout(capfd):
    isolated(prints, b"WARNING of a builder\n")
    out, err = capfd.readouterr()
    assert out == ""
    assert "WARNING of a builder" in err
