import pytest

from deploy import progress
from deploy.progress import Progress


def test_where_there_is_no_terminal_a_long_stage_says_every_minute_how_far_it_is(monkeypatch, capsys):
    clock = iter([0, 5, 30, 65, 80, 125])
    shown = Progress("title")
    with shown.stage("learn") as note, shown.steps() as at:
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
        shown.on_terminal = False
        at = shown._now_and_then()
        for done in (101, 126, 161, 176, 221):  # the first call tells where it goes on
            at(done, 341)
        monkeypatch.undo()
        note("done")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "title"
    assert lines[1:3] == ["  learn      step 161 of 341, 3 min left", "  learn      step 221 of 341, 2 min left"]
    assert lines[3].startswith("  learn ")
    assert lines[3].endswith(" s  done")


def test_items_pass_through_a_bar_unchanged(capsys):
    shown = Progress("title")
    with shown.stage("read"):
        assert list(shown.bar(iter("abc"), 3)) == ["a", "b", "c"]
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_bars_of_a_stage_end_with_it_though_it_fails(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    shown = Progress("title")
    with pytest.raises(KeyError), shown.stage("fail"), shown.steps() as at:  # noqa: PT012 - what fails is inside
        at(1, 3)
        passes = shown.bar([1, 2], 2)
        next(passes)
        next(passes)
        assert [(task.completed, task.total) for task in shown.bars.tasks] == [(1, 3), (1, 2)]
        assert shown.bars.live.is_started
        raise KeyError
    assert not shown.bars.live.is_started
