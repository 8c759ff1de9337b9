"""Known GPUs with their rates, and hours and MFU (share of the peak) from these."""

import difflib
import re
from dataclasses import dataclass

from inheritune_ds.errors import RecipeError, TrainingError

PLANNING_MFU = 0.5
"""Model FLOPs utilization that plans assume; the best published for 1-3B models is 0.41-0.50 on H100
(MosaicML llm-foundry, llm.c) and 0.60-0.64 on A100 (the same)."""


@dataclass(frozen=True)
class Gpu:
    """A GPU model. Rates are of one card and one direction; GB are 10**9 bytes.

    Attributes:
        name: Short name for `--gpu`.
        label: Name in tables.
        peak_bf16_flops: Dense bf16 tensor-core peak with fp32 accumulation, in FLOP/s.
        memory_gib: Memory that the driver reports for one card, in GiB.
        memory_gb_per_s: Bandwidth of that memory.
        node_gb_per_s: Bus bandwidth of collectives within a node (as nccl-tests define it).
        network_gb_per_s: Bus bandwidth of collectives across nodes.
        pattern: Regular expression for the name that the driver reports.
    """

    name: str
    label: str
    peak_bf16_flops: float
    memory_gib: float
    memory_gb_per_s: float
    node_gb_per_s: float
    network_gb_per_s: float
    pattern: str


# Collectives within a node. NVLink: measured all-reduce of 8 cards, stas00/ml-engineering network/README.md (A100 235,
# H200 ring 367; H100 has the same links; B200's links are twice as fast: twice the rate is assumed). PCIe: assumed,
# 12 GB/s for generation 4 (31 GB/s in theory, shared by both directions through the host) and 24 for generation 5.
_NVLINK3, _NVLINK4, _NVLINK5, _PCIE4, _PCIE5 = 235.0, 367.0, 734.0, 12.0, 24.0
# Collectives across nodes: 80 % (as the NVLink figures above) of one network link per GPU on SXM boards (DGX A100:
# 8 x 200 Gb/s; DGX H100, H200, B200: 8 x 400 Gb/s; a ring uses all eight), of one 100 Gb/s link per node on PCIe cards.
_HDR8, _NDR8, _ETHERNET = 0.8 * 8 * 25.0, 0.8 * 8 * 50.0, 0.8 * 12.5

# The order matters for `identify`: the first matching pattern wins. Peaks: A6000 and 3090 from NVIDIA's whitepaper of
# the Ampere GA102 architecture (A6000 via apoorvkh/academic-pretraining), 4090 from that of the Ada architecture; the
# others from NVIDIA's data sheets, dense (from H100 on half of the figure with sparsity), those of A100, H100 SXM and
# H200 also in stas00/ml-engineering. Memory: `nvidia-smi`, with ECC if it is on by default. Memory bandwidths: NVIDIA's
# data sheets.
_TABLE = (
    Gpu("a6000", "RTX A6000", 154.8e12, 48.0, 768.0, _PCIE4, _ETHERNET, r"RTX A6000"),
    Gpu("a40", "A40", 149.7e12, 45.0, 696.0, _PCIE4, _ETHERNET, r"\bA40\b"),
    Gpu("a100-40", "A100 40GB", 312e12, 40.0, 1555.0, _NVLINK3, _HDR8, r"A100.*40GB"),
    Gpu("a100-80", "A100 80GB", 312e12, 80.0, 2039.0, _NVLINK3, _HDR8, r"A100.*80GB"),
    Gpu("h100-pcie", "H100 PCIe", 756e12, 79.6, 2000.0, _PCIE5, _ETHERNET, r"H100 PCIe"),
    Gpu("h100", "H100 SXM", 989e12, 79.6, 3350.0, _NVLINK4, _NDR8, r"H100"),
    # 141 GB are 131 GiB, but the driver reports 143771 MiB, that is 140.4 GiB.
    Gpu("h200", "H200 SXM", 989e12, 140.0, 4800.0, _NVLINK4, _NDR8, r"H200"),
    Gpu("b200", "B200 SXM", 2250e12, 179.0, 8000.0, _NVLINK5, _NDR8, r"\bB200"),
    Gpu("l40s", "L40S", 362.05e12, 45.0, 864.0, _PCIE4, _ETHERNET, r"L40S"),
    Gpu("l4", "L4", 121e12, 22.5, 300.0, _PCIE4, _ETHERNET, r"\bL4\b"),
    Gpu("3090", "GeForce RTX 3090", 71e12, 24.0, 936.0, _PCIE4, _ETHERNET, r"RTX 3090(?! Ti)"),
    Gpu("4090", "GeForce RTX 4090", 165.2e12, 24.0, 1008.0, _PCIE4, _ETHERNET, r"RTX 4090(?! D)"),
)
GPUS_A_NODE = 8
"""Cards that share the fast links of one node, in the systems of the bandwidths above."""
_OTHER_CARDS = re.compile(r"\bNVL\b|Laptop|Max-Q|GH200|GB200|\bMIG\b")
"""Names that contain the name of a known card but have other rates or links."""
GPUS = {gpu.name: gpu for gpu in _TABLE}
"""The known GPUs, by short name."""


def gpu(name: str) -> Gpu:
    """Look up a GPU by its short name, ignoring case.

    Raises:
        RecipeError: For an unknown one. No rate is guessed: a wrong peak makes every MFU and hour wrong.
    """
    found = GPUS.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.4)
        raise RecipeError(
            f"GPU {name!r} is unknown: its peak rate is needed for hours and MFU",
            allowed=", ".join(GPUS),
            action=f"did you mean {near[0]}?" if near else "give one of these, or no GPU",
        )
    return found


def identify(device_name: str) -> Gpu | None:
    """Find the GPU with a driver's device name such as `NVIDIA RTX A6000`; None if unknown."""
    if _OTHER_CARDS.search(device_name):
        return None
    return next((known for known in _TABLE if re.search(known.pattern, device_name)), None)


def check_mfu(mfu: float) -> None:
    """Raise RecipeError for a share of the peak that is not above 0 or is above 1."""
    if not 0.0 < mfu <= 1.0:
        raise RecipeError(
            f"MFU {mfu} is not possible",
            allowed="above 0, at most 1 (the card's peak)",
            action=f"give a share of the peak; plans assume {PLANNING_MFU}",
        )


def hours(flops: float, on: Gpu, gpus: int, mfu: float) -> float:
    """Hours that `flops` take on `gpus` cards at a share `mfu` (0 to 1) of the bf16 peak.

    Raises:
        RecipeError: For an impossible share.
    """
    check_mfu(mfu)
    return flops / (on.peak_bf16_flops * gpus * mfu) / 3600.0


def mfu(tokens_per_s: float, flops_per_token: float, on: Gpu, gpus: int) -> float:
    """Model FLOPs utilization (0 to 1) of a measured rate.

    Args:
        tokens_per_s: Tokens per second over all GPUs.
        flops_per_token: From `model_size.flops_per_token`.
        on: The GPU model.
        gpus: Number of GPUs.

    Raises:
        TrainingError: Above the peak: the clock, the count or the GPU is wrong.
    """
    share = tokens_per_s * flops_per_token / (on.peak_bf16_flops * gpus)
    if share > 1.0:
        raise TrainingError(
            f"{tokens_per_s:.0f} tokens/s x {flops_per_token:.3g} FLOP/token is {share:.0%} of the peak of "
            f"{gpus} x {on.label} ({on.peak_bf16_flops / 1e12:.1f} TFLOP/s each): the measurement is wrong",
            allowed="at most 100%",
            action="check the clock (is the device synchronized?), the GPU's name and the number of GPUs",
        )
    return share
