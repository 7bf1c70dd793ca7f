"""`make bench`: build the reference models with their defaults and keep the reports in benchmarks/results/.

Every figure in the README comes from these files.
"""

import json
import sys
import tempfile
from pathlib import Path

from deploy.pipeline import Options, engine
from deploy.report import print_report

RESULTS = Path(__file__).parent / "results"
MODELS = ("dinov2_s", "mobilenetv2")


def main() -> int:
    """Build each reference model in a scratch folder; write `results/<model>.<recipe>.json`."""
    for model in MODELS:
        with tempfile.TemporaryDirectory() as out:
            folder, report = engine(Options(model=model, out=out))
            print_report(report, folder)
        report["command"] = f"make bench (make engine MODEL={model})"
        (RESULTS / f"{model}.{report['recipe']}.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
