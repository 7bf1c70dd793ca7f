"""`python -m benchmarks.branch_forms`: kernels of a TensorRT-RTX engine by the form its branches take in the graph.

No GPU is needed: the engine's own text tells its kernels. What the forms are is in deploy/branch_forms.py.
"""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "branch_forms.json"
COLUMNS = ("form", "kernels", "delta", "int8_gemms", "fp16_gemms", "fp16_convs", "unproven", "fused_attention")


def main() -> int:
    """Build an engine of every form in one process, write `results/branch_forms.json` and print a table."""
    command = [sys.executable, "-m", "deploy.branch_forms"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout) | {
        "command": "python -m benchmarks.branch_forms",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    for row in [{name: name for name in COLUMNS}, *result["rows"]]:
        print("  ".join(str(row[name]).ljust(22 if name == "form" else len(name)) for name in COLUMNS).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
