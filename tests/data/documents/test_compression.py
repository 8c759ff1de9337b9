import bz2
import gzip
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from inheritune_ds.data.documents import compression
from inheritune_ds.errors import CorpusError

PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}
SUFFIXES = sorted(PACK)
CONTENT = b"some text that is long enough to be packed, some text that is long enough " + random.Random(1).randbytes(
    300
)


def unpack(path: Path) -> bytes:
    with compression.open_unpacked(path, lambda _: None) as stream:
        return stream.read()


@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
def test_open_unpacked_returns_the_content_and_reports_the_size(tmp_path: Path, suffix: str) -> None:
    noise = random.Random(2).randbytes(3_000_000)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACK[suffix](noise) if suffix else noise)
    reported: list[int] = []
    with compression.open_unpacked(path, reported.append) as stream:
        assert stream.read() == noise
    assert sum(reported) == path.stat().st_size
    assert len(reported) > 1


SEEK = struct.pack("<II", 0x184D2A50, 4) + b"seek"  # a skippable frame, as the seekable format has it last


@pytest.mark.parametrize(
    ("suffix", "packed"),
    [
        *((suffix, PACK[suffix](CONTENT) + PACK[suffix](b"") + PACK[suffix](b"end")) for suffix in SUFFIXES),
        (".zst", SEEK + zstandard.compress(CONTENT + b"end") + SEEK),
        (".gz", gzip.compress(CONTENT) + bytes(2_000_000) + gzip.compress(b"end") + bytes(10)),
    ],
    ids=[*SUFFIXES, "frames without content", "padding"],
)
def test_open_unpacked_reads_all_frames_of_a_file(tmp_path: Path, suffix: str, packed: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(packed)
    assert unpack(path) == CONTENT + b"end"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_open_unpacked_detects_every_truncation(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    whole = PACK[suffix](CONTENT)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(
            CorpusError, match=r"(?s)it is truncated or damaged \(its end is missing\).*download it again"
        ):
            unpack(path)
    path.write_bytes(whole)
    assert unpack(path) == CONTENT


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("junk", [b"this was never packed, whatever its name says", bytes(100)])
def test_open_unpacked_detects_a_file_of_another_format(tmp_path: Path, suffix: str, junk: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(junk)
    with pytest.raises(CorpusError, match=rf"a{suffix}: it is truncated or damaged"):
        unpack(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_open_unpacked_detects_damage_after_the_first_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACK[suffix](CONTENT) + b"junk that follows")
    with pytest.raises(CorpusError, match="it is truncated or damaged"):
        unpack(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2"])
def test_open_unpacked_needs_little_memory_for_a_large_output(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACK[suffix](bytes(2**26)))
    tracemalloc.start()
    with compression.open_unpacked(path, lambda _: None) as stream:
        assert sum(len(part) for part in iter(lambda: stream.read(2**16), b"")) == 2**26
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
