"""Launched by tests: train.py with an export that takes EXPORT_S seconds longer, and fails if FAIL is set.

A process group without a time limit of its own has one of LIMIT_S seconds, in place of minutes.
"""

import os
import sys
import time
from datetime import timedelta

from torch.distributed import distributed_c10d

from inheritune_ds.cli import main
from inheritune_ds.distributed.process_group import start_process_group
from inheritune_ds.errors import ExportError
from inheritune_ds.run import export, finish

LIMIT_S = 2.0
write = export.export_model


def slow(*arguments: object, **options: object) -> str:
    """Export as the package does, but later; the other ranks wait in the collective of the first parameter."""
    time.sleep(float(os.environ["EXPORT_S"]))
    if "FAIL" in os.environ:
        raise ExportError("planted by a test")
    return write(*arguments, **options)  # type: ignore[arg-type]


finish.__dict__["export_model"] = slow
distributed_c10d.__dict__["default_pg_timeout"] = timedelta(seconds=LIMIT_S)
start_process_group.__kwdefaults__ = {"timeout_s": LIMIT_S}
if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
