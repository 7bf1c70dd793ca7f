"""`python -m deploy VERB`."""

import os
import sys

from deploy.cli import main
from deploy.errors import EXIT_INTERRUPTED

code = main()
if (
    code == EXIT_INTERRUPTED
):  # where Ctrl-C met code that a library runs, Python would end itself by the signal all the same
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
