"""Running a part: case by case, journalled, a failed case told and kept, the outcome merged."""

import shutil
import subprocess
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.campaign.cases import Case, Part
from benchmarks.campaign.journal import CODE, Journal, code_digest
from benchmarks.record import REPOSITORY, environment
from inheritune_ds.storage.files import read_json, write_json


@dataclass(frozen=True)
class CampaignFolder:
    """Where a campaign keeps its files.

    Attributes:
        path: Journals.
        scratch: Folders of cases; those of failed ones stay.
    """

    path: Path
    scratch: Path

    def journal(self, part: Part) -> Journal:
        """The journal of a part."""
        return Journal(self.path / f"{part.name}.jsonl")

    def fresh(self, part: Part, case: Case) -> Path:
        """An empty folder for a case."""
        folder = self.scratch / f"campaign-{part.name}-{case.name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def run_part(part: Part, folder: CampaignFolder, *, short: bool, again: bool, out: Path | None) -> list[str]:
    """Run the cases that have not passed yet, then merge the outcome of all.

    Args:
        part: The part.
        folder: Its journal and scratch folders.
        short: Only the short form.
        again: Forget what has passed.
        out: The file to merge into; None for no merge.

    Returns:
        `part/case` of every case that failed.
    """
    journal, cases = folder.journal(part), part.chosen(short=short)
    if again:
        journal.forget()
    done = journal.passed(code_digest())
    waiting = [case for case in cases if case.name not in done]
    print(f"{part.name}: {part.promise}\n{part.name}: {len(waiting)} cases to run, {len(cases) - len(waiting)} done")
    failed: list[str] = []
    begun = time.monotonic()
    for number, case in enumerate(waiting, 1):
        entry = _run(part, case, folder)
        journal.add(entry)
        if not entry["passed"]:
            failed.append(case.name)
        rate_s = (time.monotonic() - begun) / number
        print(
            f"{part.name} {number}/{len(waiting)} {case.name}: {'passed' if entry['passed'] else 'FAILED'} in "
            f"{entry['seconds']:.1f} s; {rate_s:.1f} s a case, {(len(waiting) - number) * rate_s / 60:.1f} min left",
            flush=True,
        )
    if out is not None:
        _merge(part, cases, journal, failed, out)
    return [f"{part.name}/{name}" for name in failed]


def _run(part: Part, case: Case, folder: CampaignFolder) -> dict[str, Any]:
    """Run one case; its line for the journal."""
    scratch, code, begun = folder.fresh(part, case), code_digest(), time.monotonic()
    told: dict[str, Any]
    try:
        told = {"passed": True, "figures": case.run(scratch)}
        shutil.rmtree(scratch)
    except Exception as error:  # noqa: BLE001 (whatever went wrong is a failed case, and the others are run, too)
        evidence = str(error) if isinstance(error, AssertionError) and str(error) else traceback.format_exc()
        told = {"passed": False, "evidence": evidence, "folder": str(scratch)}
        print(f"{part.name} {case.name} FAILED; its files: {scratch}\n{evidence}", flush=True)
    seconds, date = round(time.monotonic() - begun, 2), datetime.now(UTC).isoformat(timespec="seconds")
    if code != code_digest():
        print(f"{part.name} {case.name}: the code changed while it ran; it will be run again", flush=True)
        code += "-changed"
    return {"case": case.name, "code": code, "seconds": seconds, "date": date, **told}


def _merge(part: Part, cases: list[Case], journal: Journal, failed: list[str], out: Path) -> None:
    """Put the outcome of one part beside those of the others, if every case has one."""
    code = code_digest()
    passed = journal.passed(code)
    if unrun := [case.name for case in cases if case.name not in passed and case.name not in failed]:
        print(
            f"{part.name}: no result is written, since the code has changed; the same command runs {len(unrun)} again"
        )
        return
    told = environment()
    entries = [passed[case.name] for case in cases if case.name in passed]
    outcome = {
        "point": part.point,
        "promise": part.promise,
        "cases": len(cases),
        "passed": len(entries),
        "failed": failed,
        "figures": dict(part.summary([entry["figures"] for entry in entries])) if entries else {},
        "seconds": round(sum(entry["seconds"] for entry in entries), 1),
        "code": code,
        "changed": _changed(),
        **told,
        "command": f"python -m benchmarks.campaign {part.name}",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {**(read_json(out) or {}), part.name: outcome})
    print(f"{part.name}: {len(entries)} of {len(cases)} passed")


def _changed() -> bool | None:
    """Whether a file that cases depend on differs from the commit; None outside a checkout."""
    command = ["git", "-C", str(REPOSITORY), "status", "--porcelain", "--", *CODE]
    try:
        return bool(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        return None
