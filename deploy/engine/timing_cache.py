"""What TensorRT measured of kernels when it built an engine, kept for the next build, which need not time them again.

Timings hold for one version on one GPU, and TensorRT checks both in what it is given; a file of its own for each pair keeps
them apart from the start.
"""

import re
from pathlib import Path
from typing import Any

from calib.errors import UserError
from calib.store.kept_files import replacing
from calib.store.user_cache import cache_folder

FOLDER = "timings"  # in the user's cache


def timings_file(version: str, gpu: str) -> Path | None:
    """The file for this version of TensorRT on the GPU of this name; None for a user without a folder for such things."""
    try:
        folder = cache_folder(FOLDER)
    except UserError:
        return None
    return folder / (re.sub(r"\W+", "_", f"tensorrt {version} {gpu}") + ".cache")


class Timings:
    """The timings of one build, from and to `path`; None: they are forgotten."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.cache: Any = None  # ITimingCache

    def give(self, config: Any) -> None:
        """Let the builder with this `config` (IBuilderConfig) begin with what is kept, if it fits (edits `config`)."""
        try:
            kept = self.path.read_bytes() if self.path else b""
        except OSError:
            kept = b""
        for content in dict.fromkeys((kept, b"")):
            self.cache = config.create_timing_cache(content)
            # False, after a message, for timings of another version or GPU; damaged ones give no cache at all
            if self.cache is not None and config.set_timing_cache(self.cache, False):
                return
        self.cache = None

    def keep(self) -> str:
        """Write what is known now. Returns why it was not kept, or an empty string."""
        if self.cache is None or self.path is None:
            return ""
        try:
            with replacing(self.path) as file:
                file.write_bytes(bytes(self.cache.serialize()))
        except OSError as error:
            return f"timings of kernels are not kept for the next build: {error.strerror} ('{self.path.parent}')"
        return ""
