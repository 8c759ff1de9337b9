"""Documents that are kept apart inside windows: errors against every document alone, and the cost of a pass.

`python -m benchmarks.packing` measures on this CPU and writes docs/results/packing.json; on a GPU it is the part
`packing` of benchmarks.gpu. A pass is forward and backward of one micro-batch; windows and documents take turns on the
same model and tokens.
"""

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from benchmarks.gpu_parts.timing import spread
from benchmarks.ranks import fit, random_model
from benchmarks.record import command_line, record
from inheritune_ds.config.kernels import Attention, KernelRequest
from inheritune_ds.config.model import Shape
from inheritune_ds.training.packing import DocumentPacking, WindowInputs, document_starts
from tests import tiny

EOS = 0
PACKING = DocumentPacking(EOS)
DOCUMENT_TOKENS = 400
"""Mean length of the documents that time is measured on; a web page of OpenWebText has about twice as many."""
TURNS, WARM_UP = 9, 2


@dataclass(frozen=True)
class Setting:
    """A measured model, in the keys of a recipe's `shape`, with windows as long as its positions.

    `windows` is the size of a micro-batch; `compiled` compiles the blocks.
    """

    shape: dict[str, Any]
    windows: int
    device: str
    dtype: torch.dtype
    attention: Attention
    compiled: bool = False

    @property
    def seq_len(self) -> int:
        """Tokens a window."""
        return int(self.shape["max_position_embeddings"])


def build(setting: Setting) -> PreTrainedModel:
    """The model with its kernels, as the engine fits them.

    Raises:
        InherituneError: If a kernel cannot be used here.
    """
    model = random_model(Shape.model_validate(setting.shape))
    request = KernelRequest(attention=setting.attention, loss="chunked", compile=setting.compiled, liger=False)
    fit(model, request, torch.device(setting.device), setting.dtype)
    model.train()
    return model


def tokens(setting: Setting, number: int, *, document_tokens: int = DOCUMENT_TOKENS) -> torch.Tensor:
    """Windows (B, T + 1) of random documents, whose lengths are drawn, too."""
    generator = torch.Generator().manual_seed(number)
    size = (setting.windows, setting.seq_len + 1)
    found = torch.randint(1, setting.shape["vocab_size"], size, generator=generator)
    return found.masked_fill(torch.rand(size, generator=generator) < 1.0 / document_tokens, EOS)


def one_pass(model: PreTrainedModel, windows: WindowInputs, batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Forward and backward; the sum of the losses, on the device."""
    with windows.apart():
        loss, total = model(**windows.with_targets(batch, device))
        loss.backward()
    return total  # type: ignore[no-any-return]


def errors(setting: Setting, *, document_tokens: int) -> dict[str, float]:
    """Errors of windows against the sums over every document alone, on the same kernels.

    Returns:
        `loss`: Difference of the mean loss, nats.
        `gradient`: Norm of the gradient's difference over its norm.
    """
    model, device = build(setting), torch.device(setting.device)
    batch = tokens(setting, 0, document_tokens=document_tokens)
    packed = one_pass(model, WindowInputs(PACKING, setting.attention), batch, device)
    gradient = _gradient(model)
    alone, targets, plain = 0.0, 0, WindowInputs(None, setting.attention)
    for row in batch:
        bounds = [*document_starts(row[None], EOS)[0].nonzero().flatten().tolist(), len(row)]
        for begin, end in pairwise(bounds):
            if end - begin > 1:
                alone += float(one_pass(model, plain, row[None, begin:end], device))
                targets += end - begin - 1
    wanted = _gradient(model)
    return {
        "loss": abs(float(packed) - alone) / targets,
        "gradient": float((gradient - wanted).norm() / wanted.norm()),
    }


def _gradient(model: PreTrainedModel) -> torch.Tensor:
    found = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def times(setting: Setting) -> dict[str, Any]:
    """Seconds of a pass over windows and over documents kept apart, turn by turn; memory and graphs besides.

    Returns:
        `windows`, `documents`: Median, least and most seconds. `ratio`: The same of documents over windows, by turns.
        `peak_gib`: Most memory of a pass of each, on a GPU. `compiled_again`: Graphs made after the warm-up.
    """
    model, device = build(setting), torch.device(setting.device)
    kinds = {"windows": WindowInputs(None, setting.attention), "documents": WindowInputs(PACKING, setting.attention)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    peaks: dict[str, float] = {}
    graphs = 0
    for turn in range(WARM_UP + TURNS):
        if turn == WARM_UP:
            graphs = counters["stats"]["unique_graphs"]
        batch = tokens(setting, turn)
        for kind, windows in kinds.items():
            found, peak = _timed(model, windows, batch, device)
            if turn >= WARM_UP:
                seconds[kind].append(found)
                if peak is not None:
                    peaks[kind] = max(peak, peaks.get(kind, 0.0))
    ratios = [documents / windows for windows, documents in zip(*seconds.values(), strict=True)]
    return {
        **{kind: spread(values) for kind, values in seconds.items()},
        "ratio": spread(ratios),
        "peak_gib": peaks,
        "compiled_again": counters["stats"]["unique_graphs"] - graphs,
    }


def _timed(
    model: PreTrainedModel, windows: WindowInputs, batch: torch.Tensor, device: torch.device
) -> tuple[float, float | None]:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    one_pass(model, windows, batch, device)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else None


def cpu_settings() -> dict[str, Setting]:
    """Settings for a CPU: the model of the quickstart's size, long and short windows."""
    shape = {**tiny.LLAMA, "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 704}
    shapes = {seq_len: {**shape, "max_position_embeddings": seq_len} for seq_len in (256, 1024)}
    return {
        f"{name}, {seq_len} tokens": Setting(shapes[seq_len], windows, "cpu", dtype, "sdpa")
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        for seq_len, windows in ((256, 4), (1024, 1))
    }


def main() -> None:
    """Measure, print a table, write the JSON file."""
    args = command_line("packing", __doc__).parse_args()
    found: dict[str, Any] = {}
    for name, setting in cpu_settings().items():
        found[name] = {**times(setting), "errors": errors(setting, document_tokens=setting.seq_len // 8)}
        ratio = found[name]["ratio"]
        print(
            f"{name:<20} documents / windows {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}), "
            f"loss off by {found[name]['errors']['loss']:.1e}, gradient by {found[name]['errors']['gradient']:.1e}"
        )
    record(args, {"document_tokens": DOCUMENT_TOKENS, "turns": TURNS, "settings": found})


if __name__ == "__main__":
    main()
