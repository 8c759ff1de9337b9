"""GPUs whose peak rate is known, and what follows from a peak: hours, and the share of it reached (MFU)."""

import difflib
import re
from dataclasses import dataclass

from inheritune_ds.errors import RecipeError, TrainingError

PLANNING_MFU = 0.5
"""Model FLOPs utilisation that plans assume; the best published for 1-3B models is 0.41-0.50 on H100
(MosaicML llm-foundry, llm.c) and 0.60-0.64 on A100 (the same)."""


@dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        name: Short name, as `--gpu` takes it.
        label: Name for people.
        peak_bf16_flops: Dense bf16 tensor-core peak with fp32 accumulation, in FLOP/s.
        memory_gib: Memory of one card, in GiB.
        pattern: Regular expression for the name that the driver reports.
        source: Where the peak stands.
    """

    name: str
    label: str
    peak_bf16_flops: float
    memory_gib: float
    pattern: str
    source: str


_AMPERE = "NVIDIA Ampere GA102 architecture whitepaper"
_SHEET = "NVIDIA data sheet, dense (half of the figure with sparsity)"

# The order matters for `identify`: the first pattern that is found wins.
_TABLE = (
    Gpu("a6000", "RTX A6000", 154.8e12, 48.0, r"RTX A6000", f"{_AMPERE} (via apoorvkh/academic-pretraining)"),
    Gpu("a40", "A40", 149.7e12, 48.0, r"\bA40\b", "NVIDIA data sheet, dense"),
    Gpu("a100-40", "A100 40GB", 312e12, 40.0, r"A100.*40GB", "NVIDIA data sheet, dense; stas00/ml-engineering"),
    Gpu("a100-80", "A100 80GB", 312e12, 80.0, r"A100.*80GB", "NVIDIA data sheet, dense; stas00/ml-engineering"),
    Gpu("h100-pcie", "H100 PCIe", 756e12, 80.0, r"H100 PCIe", _SHEET),
    Gpu("h100", "H100 SXM", 989e12, 80.0, r"H100", f"{_SHEET}; stas00/ml-engineering"),
    # 141 GB are 131 GiB; the driver reports 143771 MiB, that is 140.4 GiB.
    Gpu("h200", "H200 SXM", 989e12, 140.0, r"H200", f"{_SHEET}; stas00/ml-engineering"),
    Gpu("l40s", "L40S", 362.05e12, 48.0, r"L40S", _SHEET),
    Gpu("3090", "GeForce RTX 3090", 71e12, 24.0, r"RTX 3090(?! Ti)", _AMPERE),
    Gpu("4090", "GeForce RTX 4090", 165.2e12, 24.0, r"RTX 4090(?! D)", "NVIDIA Ada architecture whitepaper"),
)
GPUS = {gpu.name: gpu for gpu in _TABLE}
"""The GPUs known here, by short name."""


def gpu(name: str) -> Gpu:
    """Look a GPU up by its short name; case does not count.

    Raises:
        RecipeError: For an unknown one. No rate is guessed: a wrong peak makes every MFU and hour wrong.
    """
    found = GPUS.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.4)
        raise RecipeError(
            f"GPU {name!r} is unknown: its peak rate is needed for hours and MFU",
            allowed=", ".join(GPUS),
            action=f"did you mean {near[0]}?" if near else "give one of these, or leave the GPU out",
        )
    return found


def identify(device_name: str) -> Gpu | None:
    """Find the GPU behind a driver's device name such as `NVIDIA RTX A6000`; None when it is not known."""
    return next((known for known in _TABLE if re.search(known.pattern, device_name)), None)


def hours(flops: float, on: Gpu, gpus: int, mfu: float) -> float:
    """Hours that `flops` take on `gpus` cards at a share `mfu` (0 to 1) of the bf16 peak.

    Raises:
        RecipeError: For a share that is not above 0 or is above 1.
    """
    if not 0.0 < mfu <= 1.0:
        raise RecipeError(
            f"MFU {mfu} is not possible",
            allowed="above 0, at most 1 (the card's peak)",
            action=f"give a share of the peak; plans assume {PLANNING_MFU}",
        )
    return flops / (on.peak_bf16_flops * gpus * mfu) / 3600.0


def mfu(tokens_per_s: float, flops_per_token: float, on: Gpu, gpus: int) -> float:
    """Model FLOPs utilisation (0 to 1) of a measured rate.

    Args:
        tokens_per_s: Tokens a second over all GPUs.
        flops_per_token: As `budget.flops_per_token` counts them.
        on: The GPU model.
        gpus: How many.

    Raises:
        TrainingError: Above the peak. Such a number is a wrong clock, count or GPU, never a fast run.
    """
    share = tokens_per_s * flops_per_token / (on.peak_bf16_flops * gpus)
    if share > 1.0:
        raise TrainingError(
            f"{tokens_per_s:.0f} tokens/s x {flops_per_token:.3g} FLOP/token is {share:.0%} of the peak of "
            f"{gpus} x {on.label} ({on.peak_bf16_flops / 1e12:.1f} TFLOP/s each): the measurement is wrong",
            allowed="at most 100%",
            action="check the clock (is the device synchronised?), the GPU's name and the number of GPUs",
        )
    return share
