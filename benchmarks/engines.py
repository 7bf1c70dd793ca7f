"""`make bench`: build the reference models with their defaults and keep the reports in benchmarks/results/.

Every figure in the README comes from these files (`deploy/readme.py` puts them there). Each model runs in a process of its
own, so that its peak memory is its own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MODELS = ("dinov2_s", "mobilenetv2")


def main() -> int:
    """Build each reference model in a scratch folder; write `results/<model>.<recipe>.json`."""
    reports = []
    for model in MODELS:
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-m", "deploy", "engine", "--model", model, "--out", out, "--json"]
            command += ["--cache", "off"]  # the time of the whole work
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        reports.append(json.loads(done.stdout) | {"command": f"make bench (make engine MODEL={model})"})
    for report in reports:  # only now, so that the checkout they describe was clean
        (RESULTS / f"{report['model']}.{report['recipe']}.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
