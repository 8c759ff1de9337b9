"""Launched by tests: train.py with an export that takes EXPORT_S seconds longer, and fails if FAIL is set."""

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
    return write(*arguments, **options)  # type: ignore[arg-type]


finish.__dict__["export_model"] = slow
if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
