"""What is said of a processor is what its kernel says; the memory of large tensors is used again."""

import os
import platform
import subprocess
import sys

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


FAULTS = """
import resource, sys
import numpy as np
from deploy.host import return_memory, reuse_memory
reuse_memory()
def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(64_000_000, 1, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fill()
again = fill()
return_memory()
print(again, fill())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such thresholds")
@pytest.mark.parametrize("told", [False, True])
def test_memory_is_used_again_until_it_is_returned_unless_the_environment_says_otherwise(told):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "33554432"} if told else {}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    again, returned = map(int, done.stdout.split())
    print(f"{again} new pages for a tensor behind another one, {returned} behind what was returned")
    assert (again < returned / 2) == (not told)  # how many they are depends on the size of pages
