"""Engines are kept under all that decides them. Oracle: what a made-up backend was asked to build."""

from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest

from calib.errors import UserError
from calib.store.checkpoint import read_state, write_state
from deploy import kept_engines
from deploy.engine.backends import Built
from deploy.engine.build import Profile
from deploy.engine.builder import Builder, Wanted
from deploy.engine.kernels import Kernel, KernelTensor
from deploy.kept_engines import CLASSES, KeptEngines

KERNEL = Kernel(
    "k", "gemm", ("int8", "int8"), ("fp16",), ("a", "b"), (KernelTensor("x", "int8", (2, 3), True),),
    (KernelTensor("y", "fp16", None),), 6,
)  # fmt: skip

WANTED = Wanted(Profile(2, 4), (89,), Builder(level=5))


def graph(name="one"):
    return onnx.helper.make_model(onnx.helper.make_graph([], name, [], []))


@pytest.fixture
def asked(monkeypatch):
    """(graph's name, profile, architectures) of all that was built."""
    found = []

    def build(backend, model, profile, sms, builder):
        found.append((model.graph.name, profile, sms, builder))
        return Built(
            b"\0plan" + model.graph.name.encode(), backend.NAME, backend.version(), ("SM1",), (KERNEL,),
            {"programs": [["a", "b"]]}, {"profile": [1, 2, 4]}, ("read this",),
        )  # fmt: skip

    monkeypatch.setattr(kept_engines, "build_apart", build)
    return found


def backend(version="1.0", machine="gpu"):
    return SimpleNamespace(NAME="made_up", version=lambda: version, depends_on=lambda: {"gpu": machine})


def test_the_same_graph_is_not_built_again(tmp_path, asked):
    first, key, said = KeptEngines(tmp_path).built(backend(), graph(), WANTED, anew=False)
    assert (key, said) == ("", ())
    again, key, said = KeptEngines(tmp_path).built(backend(), graph(), WANTED, anew=False)
    assert again == first
    assert said == (f"taken from cache {key[:12]}",)
    assert asked == [("one", Profile(2, 4), (89,), Builder(level=5))]


@pytest.mark.parametrize(
    "other",
    [
        {"model": graph("two")}, {"backend": backend("1.1")}, {"backend": backend(machine="another")}, {"anew": True},
        *({"wanted": replace(WANTED, **one)} for one in (
            {"profile": Profile(2, 8)}, {"profile": Profile(1, 4)}, {"sms": (86, 89)}, {"sms": None}, {"builder": Builder()},
        )),
    ],
)  # fmt: skip
def test_anything_else_is_built(tmp_path, asked, other):
    given = {"backend": backend(), "model": graph(), "wanted": WANTED, "anew": False}
    KeptEngines(tmp_path).built(**given)
    _, key, said = KeptEngines(tmp_path).built(**given | other)
    assert (key, said, len(asked)) == ("", (), 2)


def test_other_code_builds_anew(tmp_path, asked, monkeypatch):
    given = (backend(), graph(), Wanted(Profile(), None))
    KeptEngines(tmp_path).built(*given, anew=False)
    monkeypatch.setattr(kept_engines, "code_sha256", lambda *_: "other")
    KeptEngines(tmp_path).built(*given, anew=False)
    assert len(asked) == 2


def test_without_a_folder_everything_is_built_and_nothing_kept(asked):
    for _ in range(2):
        _, key, said = KeptEngines(None).built(backend(), graph(), Wanted(Profile(), None), anew=False)
        assert (key, said) == ("", ())
    assert len(asked) == 2


def test_a_damaged_or_renamed_file_is_not_used_and_said(tmp_path, asked):
    engines, given = KeptEngines(tmp_path), (backend(), graph(), Wanted(Profile(), None))
    engines.built(*given, anew=False)
    (path,) = tmp_path.glob("made_up.*.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    _, key, said = engines.built(*given, anew=False)
    assert (key, said) == ("", (f"{path} is damaged: not used",))
    assert path.read_bytes() == whole  # mended by the build

    write_state(path, {**read_state(path, CLASSES), "key": "another"})
    _, key, said = engines.built(*given, anew=False)
    assert (key, said) == ("", (f"{path} is made from other inputs than its name says: not used",))
    assert len(asked) == 3


@pytest.mark.usefixtures("asked")
def test_a_folder_that_cannot_be_written_is_said_and_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    built, key, said = KeptEngines(tmp_path / "file").built(backend(), graph(), Wanted(Profile(), None), anew=False)
    assert built.plan == b"\0planone"
    assert key == ""
    assert said == (f"not kept: {tmp_path / 'file'} cannot be written (File exists)",)


def test_what_cannot_be_built_is_not_kept(tmp_path, monkeypatch):
    def refuses(*_):
        raise UserError("no")

    monkeypatch.setattr(kept_engines, "build_apart", refuses)
    with pytest.raises(UserError, match=r"^no$"):
        KeptEngines(tmp_path).built(backend(), graph(), Wanted(Profile(), None), anew=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("asked")
def test_those_used_longest_ago_go_first(tmp_path, monkeypatch):
    engines = KeptEngines(tmp_path)
    engines.built(backend(), graph("one"), Wanted(Profile(), None), anew=False)
    size = next(tmp_path.iterdir()).stat().st_size
    monkeypatch.setattr(kept_engines, "MOST_BYTES", size * 3 // 2)
    engines.built(backend(), graph("two"), Wanted(Profile(), None), anew=False)
    _, _, said = engines.built(backend(), graph("two"), Wanted(Profile(), None), anew=False)
    assert said
    assert len(list(tmp_path.iterdir())) == 1
