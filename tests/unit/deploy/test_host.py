"""What is said of a processor is what its kernel says."""

import pytest

from deploy import host

X86 = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\nmodel name\t: Other\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        (X86.format("avx512_vnni amx_int8"), "Some CPU @ 2 GHz", ("avx512_vnni", "amx_int8")),
        (X86.format("avx512_vnni_not"), "Some CPU @ 2 GHz", ()),
        (ARM, None, ("asimddp", "i8mm")),
        ("", None, ()),
    ],
)
def test_instructions_are_read_from_the_first_processor(tmp_path, monkeypatch, text, name, found):
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr("builtins.open", lambda _path, opened=open: opened(path))
    assert host.int8_instructions() == found
    assert host.describe()["int8_instructions"] == list(found)
    if name:
        assert host.processor() == name
    assert host.processor()


def test_a_machine_without_cpuinfo_has_a_name(monkeypatch):
    def missing(_path):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert host.processor()
    assert host.int8_instructions() == ()
