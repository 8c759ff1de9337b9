"""This program as shipped against other trainers of the same model on the same machine.

`python -m benchmarks.peers --litgpt-python L/bin/python` writes docs/results/peers.json and ends with 1 if a bar is
missed. The program chooses its kernels, compilation and allocator itself. The others: the plain loop that a user would
write (Hugging Face model, autocast, AdamW), Hugging Face's Trainer with DeepSpeed ZeRO-1, litgpt's pretraining (which
compiles; in an environment of its own), and nanoGPT (--shape gpt2 --nanogpt FOLDER). Run it on an idle machine.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.comparison import Comparison
from benchmarks.side_by_side import Setting
from benchmarks.side_by_side_cli import Benchmark

SHIPPED = "project_shipped"
BARS: dict[str, dict[str, float | None]] = {
    "cpu": {"plain": 1.25, "hf_trainer": 1.2, "litgpt": 1.1, "nanogpt": None},
    "cuda": {"plain": None, "hf_trainer": 1.3, "litgpt": None, "nanogpt": 1.05},
}
"""Tokens/s of the program over those of a peer, at least."""


def subjects(args: argparse.Namespace) -> Sequence[str]:
    """The subjects that can be run; prints those that are skipped."""
    chosen = ["plain", SHIPPED, "hf_trainer"]
    for name, given, how in (
        ("litgpt", args.litgpt_python, "--litgpt-python L/bin/python"),
        ("nanogpt", args.nanogpt and args.shape != "llama", "--shape gpt2 --nanogpt FOLDER"),
    ):
        if given:
            chosen.append(name)
        else:
            print(f"{name}: skipped ({how} includes it)", flush=True)
    return chosen


def comparisons(setting: Setting) -> Sequence[Comparison]:
    """The program over each peer; the bars on a CPU are for the llama shape."""
    promised = setting.device == "cuda" or setting.shape[0] == "llama"
    bars = BARS[setting.device]
    return [
        Comparison(f"{SHIPPED} over {name}", SHIPPED, name, bar if promised else None) for name, bar in bars.items()
    ]


BENCHMARK = Benchmark(
    name="peers",
    about="This program as shipped against other trainers of the same model.",
    subjects=subjects,
    batches="8x4",
    allocator="default",
    comparisons=comparisons,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
