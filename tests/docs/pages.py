"""The pages a reader sees, and the commands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def commands(text: str) -> list[str]:
    """Every `make` and `python -m` command of a page, without comments and line breaks; none of a generated block.

    Those blocks tell what was typed at the commit that they were measured at.
    """
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = [" ".join(one.split()) for one in re.findall(r"`([^`]+)`", prose)]
    written = [line.split("#")[0].strip() for line in lines] + inline
    return [one for one in written if re.match(r"(make|python -m) [a-z]", one)]
