"""Peak host memory of building an engine from a target's files, and of exporting it.

`python -m benchmarks.host_memory` writes a target in fp32 and in bf16, builds the engine of each precision from it on
one rank, and exports it, all in processes of their own. A thread samples the anonymous memory of the process: pages
mapped from a file do not count, since the kernel drops them when memory is short. The figures are bytes a parameter
above what the process held before. It writes docs/results/host_memory.json; `--before FILE` adds the figures of another
commit.
"""

import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.ranks import Case, build_engine, on_ranks, random_model
from benchmarks.record import command_line, record
from inheritune_ds.config.zero import Precision
from inheritune_ds.distributed.world import World

SAMPLE_S = 0.002
LARGE: dict[str, Any] = {"hidden_size": 512, "blocks": 8, "vocab_size": 16000}
SMALL: dict[str, Any] = {"hidden_size": 64, "blocks": 2, "vocab_size": 1024}
FILES = ("float32", "bfloat16")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status: this needs Linux")


@contextmanager
def peak_growth(into: dict[str, float], name: str) -> Iterator[None]:
    """Note the largest growth of anonymous memory inside."""
    start, peak, ended = anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            peak[0] = max(peak[0], anonymous_bytes() - start)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    into[name] = float(peak[0])


def write_target(folder: Path, case: Case, dtype: str) -> None:
    """A model with its tokenizer, as surgery leaves a target."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = random_model(case.shape).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<s>": 0}, "<s>")))
    tokenizer.save_pretrained(folder)


def measure(world: World, folder: str, precision: Precision, size: dict[str, Any]) -> dict[str, float]:
    """Build an engine of the target in a folder and export it, both in this process."""
    target, case = Path(folder), Case(precision=precision, **size)
    from inheritune_ds.run.export import export_model

    build_engine(Case(precision=precision, **SMALL), world)[0].close()  # what every first engine imports
    found: dict[str, float] = {}
    with peak_growth(found, "load"):
        engine, _ = build_engine(case, world, target)
    with peak_growth(found, "export"):
        export_model(
            target.with_name(f"export-{target.name}-{precision}"),
            target_folder=target,
            tokenizer_folder=target,
            parameters=engine.full_parameters(),
            dtype="float32",
            card="",
            recipe_fingerprint="",
        )
    parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    figures = {f"{name}_bytes_per_parameter": round(value / parameters, 2) for name, value in found.items()}
    return {"parameters": parameters, **figures}


def main() -> None:
    """Measure every file type and precision."""
    parser = command_line("host_memory", __doc__, rehearse="a toy model, to see that all works")
    parser.add_argument("--before", type=Path, help="result of another commit, to be kept beside these")
    args = parser.parse_args()
    size = SMALL if args.rehearse else LARGE
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in FILES:
            target = Path(scratch) / dtype
            write_target(target, Case(**size), dtype)
            for precision in PRECISIONS:
                arguments = {"folder": str(target), "precision": precision, "size": size}
                found[f"{dtype} files, {precision}"] = on_ranks("benchmarks.host_memory:measure", arguments, 1)
    for name, figures in found.items():
        print(f"{name}: {figures}")
    before = json.loads(args.before.read_text(encoding="utf-8")) if args.before else None
    kept = {} if before is None else {"before": {"commit": before["environment"]["commit"], "cases": before["cases"]}}
    record(args, {"cases": found, **kept})


if __name__ == "__main__":
    main()
