"""A device whose memory is numpy's: its addresses are addresses of this process."""

import ctypes
import itertools

import numpy as np


def at(address, shape, dtype):
    """The array that lies at an address of this process."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class HostDevice:
    """A `Device` in host memory. Work is done when it is put on a stream, or while a stream captures, at every launch.

    `clock` gives the time in ms of every event that is recorded.
    """

    def __init__(self, clock=None):
        self.clock = clock or itertools.count().__next__
        self.buffers, self.graphs, self.streams, self.closed = [], [], itertools.count(1), False
        self.capturing = None

    def alloc(self, size):
        assert size > 0
        self.buffers.append(np.full(size, 0xAA, np.uint8))  # as device memory, it is not cleared
        return self.buffers[-1].ctypes.data

    def do(self, work):
        """What the fake engine calls to put work on the stream."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def copy_in(self, address, array, _stream):
        assert array.flags.c_contiguous
        self.do(lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes))

    def copy_out(self, array, address, _stream):
        assert array.flags.c_contiguous
        self.do(lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes))

    def stream(self):
        return next(self.streams)

    def synchronize(self, _stream):
        assert self.capturing is None

    def event(self):
        return []

    def record(self, event, _stream):
        event[:] = [self.clock()]

    def elapsed_ms(self, begin, end):
        return end[0] - begin[0]

    def captured(self, work, _stream):
        self.capturing = []
        try:
            work()
        finally:
            graph, self.capturing = self.capturing, None
        return graph

    def launch(self, graph, _stream):
        for work in graph:
            work()

    def close(self):
        assert not self.closed
        self.closed = True
