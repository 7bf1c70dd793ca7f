"""The settings of this shell that decide how the network is reached."""

import os

SETTINGS = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "HF_ENDPOINT")


def settings() -> str:
    """Return a note that names the settings that are set, without their values, which may hold passwords; or nothing."""
    found = [name for each in SETTINGS for name in (each, each.lower()) if os.environ.get(name)]
    return f"; this shell sets {', '.join(found)}" if found else ""
