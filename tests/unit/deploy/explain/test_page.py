import io

from deploy.engine.kernels import Kernel, KernelTensor
from deploy.explain.gpus import GPUS
from deploy.explain.kernel_list import KernelLists
from deploy.explain.page import group_of, print_page


def gemm(dtype, macs=10**6):
    x, w, y = (
        KernelTensor("x", dtype, (100, 100), True),
        KernelTensor("w", dtype, (100, 100)),
        KernelTensor("y", "fp16", (100, 100), True),
    )
    return Kernel("k", "gemm", (dtype, dtype), ("fp16",), ("fc/MatMul",), (x, w), (y,), macs)


def printed(lists, batch=8, targets=()):
    stream = io.StringIO()
    print_page("title", lists, GPUS["T4"], batch, targets, stream)
    return stream.getvalue()


def test_gpus_that_the_engine_is_not_for_are_named():
    lists = KernelLists((gemm("int8"),), (gemm("fp16"),))
    said = " ".join(printed(lists, targets=("SM80", "SM86", "SM89", "SM120+")).split())
    assert "for SM80, SM86, SM89, SM120+ and does not run on T4, Orin, H100: theirs is another build" in said
    assert "does not run on" not in printed(lists)
    assert "does not run on" not in printed(lists, targets=("SM75+",))


def test_groups():
    assert group_of(gemm("int8")) == "INT8 GEMM"
    assert group_of(gemm("fp8")) == "GEMM of unknown type"
    assert group_of(Kernel("__myl_ReshTran", "other", (), (), ())) == "casts, copies"
    assert group_of(Kernel("__myl_AddReshTran", "other", (), (), ())) == "norms, activations, sums"


def test_the_page_says_what_is_an_estimate():
    text = printed(KernelLists((gemm("int8"),) * 2, (gemm("fp16"),)))
    [row] = [line.split() for line in text.splitlines() if line.startswith(" INT8 GEMM")]
    moved = 2 * (10_000 + 10_000 / 8 + 20_000) / 1e6
    assert row[2:4] == ["2", f"{moved:.1f}"]
    assert "estimates, no measurement" in text
    assert "no FP16 engine" not in text


def test_without_a_twin_there_are_no_ratios():
    text = printed(KernelLists((gemm("int8"),), None, "weights exceed FP16"))
    assert "no FP16 engine to compare with: weights exceed FP16" in text
    assert "FP16 / INT8" not in text


def test_what_cannot_be_read_is_said():
    unread = Kernel("k", "gemm", ("int8", "int8"), ("fp16",), (), (KernelTensor("x", "int8", None),), ())
    assert "the sizes of 1 tensors, the work of 1 products" in printed(KernelLists((unread,), None))
    assert "left out" not in printed(KernelLists((gemm("int8"),), None))
