"""Peak host memory of building an engine from a target's files, and of exporting it.

`python -m benchmarks.host_memory` writes a target in fp32 and in bf16 and builds the engine of each precision from it:
under ZeRO-1 on one rank, which then exports it, and under ZeRO-3 on two and four ranks, all in processes of their own.
A thread samples the anonymous memory of the process: pages mapped from a file do not count, since the kernel drops them
when memory is short. The figures are bytes per parameter of the model above what the process held before, those of the
rank with most: `load` while the target is loaded, before the engine takes it, `build` until the engine is ready. It
writes docs/results/host_memory.json; `--before FILE ...` adds the figures of other commits.
"""

import itertools
import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.ranks import Case, build_engine, gathered, on_ranks, random_model
from benchmarks.record import command_line, record
from inheritune_ds.config.zero import Precision
from inheritune_ds.distributed.world import World

SAMPLE_S = 0.002
LARGE: dict[str, Any] = {"hidden_size": 512, "blocks": 8, "vocab_size": 16000}
SMALL: dict[str, Any] = {"hidden_size": 64, "blocks": 2, "vocab_size": 1024}
FILES = ("float32", "bfloat16")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
RANKS = ((1, 1), (3, 2), (3, 4))
"""ZeRO stages and their numbers of ranks."""


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


def measure(world: World, folder: str, case: dict[str, Any]) -> dict[str, float]:
    """Build an engine of the target in a folder, and export it under ZeRO-1; the figures of the rank with most.

    The folder also holds the folder `small`, a target for what every first engine imports.
    """
    target, measured = Path(folder), Case(**case)
    from inheritune_ds.run.export import export_model

    build_engine(replace(measured, **SMALL), world, target / "small")[0].close()
    found: dict[str, float] = {}
    with peak_growth(found, "build"):
        engine, _ = build_engine(measured, world, target, lambda: peak_growth(found, "load"))
    if measured.stage == 1:
        with peak_growth(found, "export"):
            export_model(
                target.with_name(f"export-{target.name}-{measured.precision}"),
                target_folder=target,
                tokenizer_folder=target,
                parameters=engine.full_parameters(),
                dtype="float32",
                card="",
                recipe_fingerprint="",
            )
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    ranks = gathered(world, found)
    engine.close()
    figures = {
        f"{name}_bytes_per_parameter": round(max(own[name] for own in ranks) / parameters, 2) for name in ranks[0]
    }
    return {"parameters": parameters, **figures}


def main() -> None:
    """Measure every file type and precision."""
    parser = command_line("host_memory", __doc__, rehearse="a toy model, to see that all works")
    parser.add_argument(
        "--before", type=Path, nargs="*", default=[], help="results of other commits, kept beside these"
    )
    args = parser.parse_args()
    size = SMALL if args.rehearse else LARGE
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in FILES:
            target = Path(scratch) / dtype
            write_target(target, Case(**size), dtype)
            write_target(target / "small", Case(**SMALL), dtype)
            for precision, (stage, ranks) in itertools.product(PRECISIONS, RANKS):
                case = {"stage": stage, "precision": precision, **size}
                name = f"{dtype} files, {precision}, ZeRO-{stage}, {ranks} rank{'s' * (ranks > 1)}"
                arguments = {"folder": str(target), "case": case}
                found[name] = on_ranks("benchmarks.host_memory:measure", arguments, ranks)
    for name, figures in found.items():
        print(f"{name}: {figures}")
    others = [json.loads(path.read_text(encoding="utf-8")) for path in args.before]
    before = [{"commit": other["environment"]["commit"], "cases": other["cases"]} for other in others]
    record(args, {"cases": found, "before": before})


if __name__ == "__main__":
    main()
