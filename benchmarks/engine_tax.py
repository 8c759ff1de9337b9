"""The engine tax: how much longer a step of this program takes than one of a plain PyTorch loop with the same kernels.

`python -m benchmarks.engine_tax` writes docs/results/engine_tax.json and ends with 1 if a bar is missed. The base
(`plain_master`) has bf16 weights with its own fp32 masters; attention, loss, AdamW, allocator and wait policy of the
threads are those of the program. Also measured: bare DeepSpeed ZeRO-1 and Hugging Face's Trainer with it. Both the
usual step (micro-batch 8, accumulation 4) and a small one (4, 1) are measured. Run it on an idle machine.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.comparison import Comparison
from benchmarks.side_by_side import Setting
from benchmarks.side_by_side_cli import Benchmark

BAR, SMALL_STEP_BAR = 1.03, 1.15
BASE = {"project": "plain_master", "project_compiled": "plain_master_compiled"}


def subjects(_args: argparse.Namespace) -> Sequence[str]:
    """All, eager."""
    return ("plain_master", "project", "deepspeed", "hf_trainer")


def comparisons(setting: Setting) -> Sequence[Comparison]:
    """Tokens/s of the base over those of the program: the time of a step over the base's."""
    bar = BAR if setting.accumulation > 1 else SMALL_STEP_BAR
    taxes = [Comparison(f"tax of {name}", base, name, bar, at_most=True) for name, base in BASE.items()]
    others = [Comparison(f"tax of {name}", "plain_master", name) for name in ("deepspeed", "hf_trainer")]
    return [*taxes, *others]


BENCHMARK = Benchmark(
    name="engine_tax",
    about="The step of this program against that of a plain PyTorch loop with the same kernels.",
    subjects=subjects,
    batches="8x4,4x1",
    allocator="keep",
    comparisons=comparisons,
    environ={"GOMP_SPINCOUNT": "2000"},  # the program sets it for itself
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
