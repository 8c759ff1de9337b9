"""`inheritune-ds prepare`: bytes/s against bare `tokenizers` on the same cores, and its memory as the corpus grows.

`python -m benchmarks.tokenize --data DIR` writes docs/results/tokenize.json; DIR holds corpora/books and
tokenizers/gpt2. Throughput: whole books with GPT-2's tokenizer, in turns (A B C, C B A), in one process: `prepare` from
the call to the published folder (files hashed, read, checked, cut, encoded by worker processes, written, synced and
hashed) against `encode_batch` and `encode_batch_fast` of the same books in memory, without using the ids. Memory: the
command in a separate process, on the books repeated (as further files) up to each size. Every 0.1 s the resident memory
of the command and its workers is summed: RSS counts a shared page twice, PSS once. The bar is for RSS.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.comparison import Comparison, in_turns, judged, ratios, summary, table
from benchmarks.record import REPOSITORY, command_line, record
from inheritune_ds.config.corpus import Corpus, FilesSource
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.storage.files import write_json
from tests import tiny

SUBJECTS = ("project", "encode_batch", "encode_batch_fast")
MEGABYTE = 10**6
MEMORY_BAR_BYTES = 10**9
SAMPLE_S = 0.1
COMPARISONS = (
    Comparison("project over encode_batch", "project", "encode_batch", bar=0.8),
    Comparison("project over encode_batch_fast", "project", "encode_batch_fast"),
)


def read_books(data: Path, most_bytes: int | None) -> list[str]:
    """Texts of the books, at least two, up to `most_bytes` in all."""
    texts: list[str] = []
    size = 0
    for path in sorted((data / "corpora" / "books").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for line in stream:
                text = json.loads(line)["text"]
                size += len(text.encode())
                if most_bytes is not None and size > most_bytes and len(texts) > 1:
                    return texts
                texts.append(text)
    return texts


def write_corpus(folder: Path, texts: Sequence[str], size: int) -> list[str]:
    """Write the books to a file and link it under other names until all have `size` bytes."""
    first = folder / "books-0000.jsonl"
    if not first.exists():
        first.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    paths = [first]
    while first.stat().st_size * len(paths) < size:
        path = folder / f"books-{len(paths):04}.jsonl"
        if not path.exists():
            os.link(first, path)
        paths.append(path)
    return [str(path) for path in paths]


def corpus_of(paths: list[str]) -> Corpus:
    """A corpus of files; a quarter of the documents is held out, so that no part is empty."""
    return Corpus(sources=[FilesSource(kind="files", name="books", paths=paths)], validation_ratio=0.25)


def subjects(texts: list[str], paths: list[str], tokenizer: str, scratch: Path) -> dict[str, Callable[[], int]]:
    """For every subject, a function that does all the work once and returns the number of tokens."""
    from tokenizers import Tokenizer

    bare: Any = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")

    def project() -> int:
        with tempfile.TemporaryDirectory(dir=scratch) as cache:
            tokens = prepare(corpus_of(paths), tokenizer, Path(cache))
        return tokens.train_tokens + tokens.validation_tokens

    def bare_tokens(encode: Callable[[list[str]], Any]) -> int:
        return sum(len(encoding.ids) + 1 for encoding in encode(texts))

    names = ("encode_batch", "encode_batch_fast")
    return {"project": project, **{name: partial(bare_tokens, getattr(bare, name)) for name in names}}


def throughput(doing: dict[str, Callable[[], int]], size: int, rounds: int) -> dict[str, list[float]]:
    """MB/s of text of every subject, by round.

    Raises:
        SystemExit: The subjects differ in the number of tokens.
    """
    found: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    counts = set()
    for turn in in_turns(SUBJECTS, rounds):
        for name in turn:
            start = time.perf_counter()
            counts.add(doing[name]())
            found[name].append(size / MEGABYTE / (time.perf_counter() - start))
            print(f"  {name:<20}{found[name][-1]:8.2f} MB/s", flush=True)
    if len(counts) > 1:
        raise SystemExit(f"the subjects differ in the number of tokens: {sorted(counts)}")
    return found


def memory(paths: list[str], tokenizer: str, workers: int, scratch: Path) -> dict[str, Any]:
    """Run the command on files and measure its memory."""
    with tempfile.TemporaryDirectory(dir=scratch) as cache:
        recipe = Path(cache) / "recipe.yaml"
        corpus = {**corpus_of(paths).model_dump(mode="json"), "tokenizer": tokenizer}
        # Only the corpus is used.
        write_json(recipe, tiny.document(target={"shape": {**tiny.LLAMA, "vocab_size": 50_257}}, corpus=corpus))
        command = [sys.executable, "-m", "inheritune_ds", "prepare", "--recipe", str(recipe)]
        command += ["--cache-dir", f"{cache}/cache", "--workers", str(workers)]
        watched = watch(command)
    size = sum(Path(path).stat().st_size for path in paths)
    return {"corpus_bytes": size, "workers": workers, **watched}


def watch(command: Sequence[str]) -> dict[str, Any]:
    """Run a command of this program and sum the memory of its processes until it ends.

    Raises:
        SystemExit: The command fails.
    """
    start = time.perf_counter()
    process = psutil.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL)
    processes = rss = pss = 0
    while process.poll() is None:
        held = _held(process)
        processes = max(processes, len(held))
        rss = max(rss, sum(info.rss for info in held))
        pss = max(pss, sum(info.pss for info in held))
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return {
        "processes": processes,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": rss,
        "peak_pss_bytes": pss,
    }


def _held(process: psutil.Process) -> list[Any]:
    """Memory of a process and of all that it has started; what has just ended is left out."""
    found = []
    with suppress(psutil.Error):
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                found.append(member.memory_full_info())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the JSON file; 1 if a bar is missed."""
    parser = command_line("tokenize", __doc__, rehearse="a toy: it tests this command, and measures nothing")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with corpora/books/*.jsonl.gz and tokenizers/gpt2")
    add("--rounds", type=int, default=6, help="turns of each subject (default: 6)")
    add("--sizes", type=int, nargs="*", default=[35, 250, 2000], help="MB of the corpora of the memory runs")
    add("--workers", type=int, default=2, help="workers of the memory runs (default: 2)")
    args = parser.parse_args(arguments)
    if args.rehearse:
        args.rounds, args.sizes = 2, [8]
    figures = measure(args)
    print(*lines_of(figures), sep="\n", flush=True)
    record(args, {"rehearsal": args.rehearse, **figures})
    return 0 if args.rehearse or not missed(figures) else 1


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    texts = read_books(args.data, 4 * MEGABYTE if args.rehearse else None)
    tokenizer = str((args.data / "tokenizers" / "gpt2").resolve())
    size = sum(len(text.encode()) for text in texts)
    # If this is set, `tokenizers` uses its threads and does not warn when the process starts others later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        found = throughput(subjects(texts, write_corpus(scratch, texts, 0), tokenizer, scratch), size, args.rounds)
        held = []
        for megabytes in args.sizes:
            held.append(memory(write_corpus(scratch, texts, megabytes * MEGABYTE), tokenizer, args.workers, scratch))
            print(f"  {megabytes:>5} MB: {held[-1]['peak_rss_bytes'] / MEGABYTE:,.0f} MB", flush=True)
    return {
        "text_bytes": size,
        "documents": len(texts),
        "mb_per_s": {name: summary([rates]) for name, rates in found.items()},
        "ratios": {
            compared.name: judged(compared, [ratios(found, compared.above, compared.below)]) for compared in COMPARISONS
        },
        "memory_bar_bytes": MEMORY_BAR_BYTES,
        "memory": held,
    }


def missed(figures: dict[str, Any]) -> list[str]:
    """Names of the missed bars."""
    missed_ratios = [name for name, found in figures["ratios"].items() if found["verdict"] == "missed"]
    sizes = [
        f"memory at {held['corpus_bytes'] / MEGABYTE:,.0f} MB"
        for held in figures["memory"]
        if held["peak_rss_bytes"] >= figures["memory_bar_bytes"]
    ]
    return missed_ratios + sizes


def lines_of(figures: dict[str, Any]) -> list[str]:
    """The figures as tables."""
    speeds = [(f"{name} MB/s", found, ".2f") for name, found in figures["mb_per_s"].items()]
    lines = table("", [*speeds, *((name, found, ".2f") for name, found in figures["ratios"].items())])
    row = "{:>12}{:>10}{:>12}{:>14}{:>14}".format
    lines.append(row("corpus, MB", "workers", "seconds", "peak RSS, MB", "peak PSS, MB"))
    for held in figures["memory"]:
        keys = ("corpus_bytes", "peak_rss_bytes", "peak_pss_bytes")
        size, rss, pss = (f"{held[key] / MEGABYTE:,.0f}" for key in keys)
        lines.append(row(size, held["workers"], f"{held['seconds']:,.0f}", rss, pss))
    return lines


if __name__ == "__main__":
    sys.exit(main())
