"""The collection of garbage is put off inside, and never started for who had stopped it."""

import gc

import pytest

from calib.quiet import no_collection


def test_no_garbage_is_looked_for_inside_and_again_behind_an_error():
    def fails():
        with no_collection():
            with no_collection():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert gc.isenabled()


def test_who_has_stopped_the_collection_keeps_it_stopped():
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
