"""`python -m benchmarks.stage_cost MODEL RECIPE ...`: what the stages of recipes cost, in float passes over the images."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
USAGE = "usage: python -m benchmarks.stage_cost MODEL RECIPE [RECIPE ...]"


def main(arguments: list[str]) -> int:
    """Measure each recipe in a process of its own; `results/stage_cost.<model>.json` holds the last of each."""
    if len(arguments) < 2:
        print(USAGE, file=sys.stderr)
        return 2
    model, *recipes = arguments
    path = RESULTS / f"stage_cost.{model}.json"
    for recipe in recipes:
        command = [sys.executable, "-m", "deploy.stage_cost", model, recipe]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout) | {
            "command": f"python -m benchmarks.stage_cost {model} {recipe}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(kept | {recipe: result}, indent=2) + "\n")
        for stage, passes in result["stage_passes"].items():
            print(f"{stage:18}{result['stage_s'][stage]:7.1f} s {passes:6.2f} float passes")
        print(f"{'together':18}{'':10}{result['total_passes']:6.2f} float passes; peak {result['peak_rss_mb']:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
