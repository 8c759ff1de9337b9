"""A forked process behaves as a new one: words, environment, streams, exit code, signals, threads."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launching import ROOT, environment, launch, start
from tests.warm_python import WarmPython

LOOK = """
import atexit, json, os, sys, threading
atexit.register(lambda: print("tidied up"))
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ["WORD"], __name__, "torch" in sys.modules, sys.path[:2]]))
threading.Thread(target=lambda: print("from a thread")).start()
sys.exit(7)
"""


def run(warm: WarmPython, folder: Path, *words: str, **extra: str) -> tuple[int, str]:
    with (folder / "log").open("wb") as log:
        process = warm.start(words, cwd=folder, env=environment(**extra), stdout=log)
    return process.wait(timeout=60), (folder / "log").read_text()


def test_forked_process_behaves_as_a_new_one(warm: WarmPython, tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    expected = f'[["a", "b"], "{tmp_path}", "here", "__main__", true, ["%s", "{ROOT}"]]\n'
    rest = "from a thread\ntidied up\n"
    assert run(warm, tmp_path, "-c", LOOK, "a", "b", WORD="here") == (7, expected % "" + rest)
    assert run(warm, tmp_path, str(tmp_path / "look.py"), "a", "b", WORD="here") == (7, expected % tmp_path + rest)
    assert run(warm, tmp_path, "-m", "look", "a", "b", WORD="here") == (7, expected % tmp_path + rest)


def test_error_ends_the_process_with_a_traceback(warm: WarmPython, tmp_path: Path) -> None:
    code, printed = run(warm, tmp_path, "-c", "import torch\nraise KeyError('mine')")
    assert code == 1
    assert printed.endswith("KeyError: 'mine'\n")
    assert '  File "<string>", line 2, in <module>\n' in printed


def test_signals_reach_its_session(warm: WarmPython, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        words = ["-c", "import time; time.sleep(60)"]
        process = warm.start(words, cwd=tmp_path, env=environment(), stdout=log, start_new_session=True)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == process.poll() == -signal.SIGTERM
    process.kill()  # it has ended already


def test_failing_rank_ends_the_others(warm: WarmPython, tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("import os, sys, time\nsys.exit(5) if os.environ['RANK'] == '1' else time.sleep(60)\n")
    assert start(warm, tmp_path, str(script), ranks=3).wait(timeout=30) == 5
    with pytest.raises(AssertionError, match="exit code 5, not 0"):
        launch(warm, tmp_path, str(script), ranks=2)
