"""Write losses.json anew: `python -m tests.golden.refresh`; say why in the changelog."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.end_to_end.machine_kind import machine_kind
from tests.launching import environment

HERE = Path(__file__).resolve().parent
DRIVER = HERE.parent / "end_to_end" / "drive_steps.py"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        line = [sys.executable, str(DRIVER), str(out), "1,2,3", "50"]
        subprocess.run(line, check=True, env=environment())
        runs = json.loads((Path(scratch) / "out.rank0.json").read_text(encoding="utf-8"))
    kept = {
        label: {key: run[key] for key in ("losses", "grad_norms", "validation", "weights_sha256")}
        for label, run in runs.items()
    }
    document = {"command": "python -m tests.golden.refresh", "machine": machine_kind(), "runs": kept}
    (HERE / "losses.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
