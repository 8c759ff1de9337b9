"""One subject in a process of its own: `python -m benchmarks.subjects.worker ORDER`, started by `side_by_side`."""

import importlib
import json
import os
import sys

from benchmarks.subjects.turns import Finished, Order, Turns, own_channel

SUBJECTS = {
    "plain": "plain",
    "plain_master": "plain",
    "plain_master_compiled": "plain",
    "project": "project",
    "project_compiled": "project",
    "project_shipped": "project",
    "deepspeed": "frameworks",
    "hf_trainer": "frameworks",
    "litgpt": "litgpt_pretrain",
    "nanogpt": "nanogpt",
}
"""Name of a subject: the module here whose `run` trains it."""


def main() -> None:
    """Train until the harness has enough."""
    orders, answers = own_channel()
    order = Order(**json.loads(sys.argv[1]))
    subject = importlib.import_module(f"benchmarks.subjects.{SUBJECTS[order.subject]}")
    try:
        subject.run(order, Turns(order, orders, answers))
    except Finished:
        sys.stderr.flush()
        os._exit(0)  # nothing is kept, and frameworks take seconds to leave


if __name__ == "__main__":
    main()
