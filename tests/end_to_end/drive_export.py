"""Launched by tests: train.py whose rank 0 takes its time over the export, and fails in it if FAIL is set.

`python drive_export.py ARGUMENTS-OF-TRAIN.PY`; EXPORT_S says how many seconds it takes.
"""

import os
import sys
import time

from inheritune_ds.cli import main
from inheritune_ds.errors import ExportError
from inheritune_ds.run import export, finish

write = export.export_model


def slow(*arguments: object, **options: object) -> str:
    """Export as the package does, but later."""
    time.sleep(float(os.environ["EXPORT_S"]))
    if "FAIL" in os.environ:
        raise ExportError("planted by a test")
    return write(*arguments, **options)  # type: ignore[arg-type]  # passed on unread


finish.__dict__["export_model"] = slow
if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
