"""Detection of this machine, with a stand-in for the driver's tool."""

from pathlib import Path

import pytest

from inheritune_ds.plan import machine
from inheritune_ds.plan.machine import DetectedGpu, cpu_has_bf16, detect_gpus, has_driver, host_memory_gib


def install_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put only a fake `nvidia-smi` on the PATH."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


A6000 = "0, GPU-aaa1, NVIDIA RTX A6000, 49140, 48669, 8.6, [N/A]"
RTX3090 = "GPU-bbb2, NVIDIA GeForce RTX 3090, 24576, 24240, 8.6, [N/A]"
T400 = "GPU-ccc3, NVIDIA T400 4GB, 4096, 3700, 7.5, [N/A]"


def lines(*cards: str) -> str:
    """A script that prints one line per card."""
    return "\n".join(f"echo '{card}'" for card in cards)


def names(**environ: str) -> list[str]:
    return [found.name for found in detect_gpus(environ)]


def test_detect_gpus_reads_name_memory_and_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tool(tmp_path, monkeypatch, lines(A6000, "1, GPU-ddd4, NVIDIA H200, 143771, 40000, 9.0, Disabled"))
    first, second = detect_gpus({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert first == DetectedGpu("NVIDIA RTX A6000", 49140 / 1024, (8, 6), 48669 / 1024)
    assert first.bf16
    assert second.memory_gib == pytest.approx(140.4, abs=0.01)
    assert second.free_gib == pytest.approx(39.06, abs=0.01), "what another program uses is used"


def test_detect_gpus_asks_for_the_columns_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = "index,uuid,name,memory.total,memory.free,compute_cap,mig.mode.current"
    words = f"--query-gpu={columns} --format=csv,noheader,nounits"
    install_tool(tmp_path, monkeypatch, f'[ "$*" = "{words}" ] && echo "0, GPU-1, T4, 15360, 15000, 7.5, [N/A]"')
    (found,) = detect_gpus({})
    assert found.name == "T4"
    assert not found.bf16


def test_detect_gpus_is_empty_without_a_driver_or_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect_gpus({}) == []
    install_tool(tmp_path, monkeypatch, f"{lines(A6000)}\nexit 9")
    assert detect_gpus({}) == []


def test_detect_gpus_skips_lines_that_the_driver_does_not_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = "1, GPU-1, GPU, one, 10240, 9216, 8.0, [N/A]"
    install_tool(tmp_path, monkeypatch, lines("0, GPU-0, X, [N/A], [N/A], [N/A], [N/A]", known, "broken"))
    assert detect_gpus({}) == [DetectedGpu("GPU, one", 10.0, (8, 0), 9.0)]


def test_detect_gpus_puts_a_display_card_behind_the_one_that_cuda_takes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_tool(tmp_path, monkeypatch, lines(f"0, {T400}", A6000.replace("0, ", "1, ", 1)))
    assert names() == ["NVIDIA RTX A6000", "NVIDIA T400 4GB"]
    assert names(CUDA_DEVICE_ORDER="PCI_BUS_ID") == ["NVIDIA T400 4GB", "NVIDIA RTX A6000"]


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("1", ["NVIDIA RTX A6000"]),
        ("1,0", ["NVIDIA RTX A6000", "NVIDIA GeForce RTX 3090"]),
        (" 2 , 1", ["NVIDIA T400 4GB", "NVIDIA RTX A6000"]),
        ("GPU-aaa1", ["NVIDIA RTX A6000"]),
        ("GPU-bbb,GPU-a", ["NVIDIA GeForce RTX 3090", "NVIDIA RTX A6000"]),
        ("", []),
        ("-1", []),
        ("1,-1,0", ["NVIDIA RTX A6000"]),
        ("0,7,1", ["NVIDIA GeForce RTX 3090"]),
        ("1,1", []),
        ("GPU-", []),  # not unique
        ("NoDevFiles", []),
    ],
)
def test_detect_gpus_keeps_the_cards_of_cuda_visible_devices(
    visible: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_tool(tmp_path, monkeypatch, lines(f"0, {RTX3090}", A6000.replace("0, ", "1, ", 1), f"2, {T400}"))
    assert names(CUDA_VISIBLE_DEVICES=visible) == found


MIG = """case "$1" in
-L)
echo 'GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-e1)'
echo '  MIG 3g.40gb     Device  0: (UUID: MIG-s1)'
echo '  MIG 1g.10gb     Device  1: (UUID: MIG-s2)'
echo 'GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-e2)'
echo 'GPU 2: NVIDIA A100-SXM4-80GB (UUID: GPU-e3)'
echo '  MIG 1c.2g.20gb  Device  0: (UUID: MIG-s3)' ;;
*)
echo '0, GPU-e1, NVIDIA A100-SXM4-80GB, 81920, 81000, 8.0, Enabled'
echo '1, GPU-e2, NVIDIA A100-SXM4-80GB, 81920, 81000, 8.0, Enabled'
echo '2, GPU-e3, NVIDIA A100-SXM4-80GB, 81920, 81000, 8.0, Enabled' ;;
esac"""


@pytest.mark.parametrize(
    ("visible", "profiles"),
    [
        (None, ["3g.40gb", "1c.2g.20gb"]),
        ("0", ["3g.40gb"]),
        ("MIG-s2", ["1g.10gb"]),
        ("MIG-s3,MIG-s2", ["1c.2g.20gb", "1g.10gb"]),
        ("1", []),
        ("GPU-e1", ["3g.40gb"]),
    ],
)
def test_detect_gpus_counts_the_memory_of_a_slice(
    visible: str | None, profiles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_tool(tmp_path, monkeypatch, MIG)
    found = detect_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert [gpu.name for gpu in found] == [f"NVIDIA A100-SXM4-80GB MIG {profile}" for profile in profiles]
    for gpu, profile in zip(found, profiles, strict=True):
        gb = int(profile.split(".")[-1].removesuffix("gb"))
        assert gpu.memory_gib == gpu.free_gib == pytest.approx(gb * 1e9 / 2**30)
        assert gpu.bf16


def test_the_driver_s_devices_show_that_a_gpu_may_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DRIVER", (tmp_path / "nvidiactl", tmp_path / "dxg"))
    assert not has_driver()
    (tmp_path / "dxg").touch()
    assert has_driver()


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
