"""Detection of this machine, with a stand-in for the driver's tool."""

from pathlib import Path

import pytest

from inheritune_ds.plan import machine
from inheritune_ds.plan.machine import DetectedGpu, cpu_has_bf16, detect_gpus, host_memory_gib


def install_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put only a fake `nvidia-smi` on the PATH."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_detect_gpus_reads_name_memory_and_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tool(tmp_path, monkeypatch, "echo 'NVIDIA RTX A6000, 49140, 8.6'\necho 'NVIDIA H200, 143771, 9.0'")
    first, second = detect_gpus()
    assert first == DetectedGpu("NVIDIA RTX A6000", 49140 / 1024, (8, 6))
    assert first.bf16
    assert second.memory_gib == pytest.approx(140.4, abs=0.01)


def test_detect_gpus_asks_for_the_columns_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tool(
        tmp_path,
        monkeypatch,
        '[ "$*" = "--query-gpu=name,memory.total,compute_cap --format=csv,noheader,nounits" ] && echo "T4, 15360, 7.5"',
    )
    (found,) = detect_gpus()
    assert found.name == "T4"
    assert not found.bf16


def test_detect_gpus_is_empty_without_a_driver_or_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect_gpus() == []
    install_tool(tmp_path, monkeypatch, "echo 'NVIDIA RTX A6000, 49140, 8.6'\nexit 9")
    assert detect_gpus() == []


def test_detect_gpus_skips_lines_that_the_driver_does_not_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tool(tmp_path, monkeypatch, "echo 'GPU, one, 10240, 8.0'\necho 'X, [N/A], [N/A]'\necho broken")
    assert detect_gpus() == [DetectedGpu("GPU, one", 10.0, (8, 0))]


def test_host_memory_is_that_of_this_machine() -> None:
    line = next(line for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if "MemTotal" in line)
    assert 0.1 < host_memory_gib() <= int(line.split()[1]) / 2**20 + 0.01


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx512_bf16", True), ("amx_bf16 fpu", True), ("fpu avx512f bf16", False), ("", False)],
)
def test_cpu_has_bf16_reads_the_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, *, expected: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n", encoding="utf-8")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_has_bf16() is expected


def test_cpu_has_bf16_is_false_where_there_is_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "missing")
    assert cpu_has_bf16() is False
    (tmp_path / "missing").write_text("no such line\n", encoding="utf-8")
    assert cpu_has_bf16() is False
