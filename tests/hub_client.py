"""A process of its own that reads from the stand-in hub, as a run would: the clients look at HF_ENDPOINT at import.

Run as a script it takes one JSON object a line, does what it says and answers with one JSON object a line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that takes the stand-in for the hub, without a token of this machine."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        **more,
    }


class HubClient:
    def __init__(self, endpoint: str, home: Path, **more: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(endpoint, home, **more),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str, **settings: Any) -> Any:
        """Let it do something; an error comes as a dict with `error`, `exit_code` and `message`."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"what": what, **settings}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.communicate(timeout=30)


def _documents(source: dict[str, Any], start: tuple[int, int] = (0, 0), *, keep: bool = False) -> Any:
    """All documents; with `keep` an error comes with how many there were before it."""
    from inheritune_ds.config.corpus import HubSource
    from inheritune_ds.data.documents import sources
    from inheritune_ds.data.documents.records import Cursor
    from inheritune_ds.errors import InherituneError

    found = []
    try:
        for document in sources.documents(HubSource.model_validate(source), Cursor(*start)):
            found.append(document)  # noqa: PERF402 - those before an error count
    except InherituneError as error:
        if not keep:
            raise
        return {"documents": len(found), "message": str(error)}
    return found


def _identify(source: dict[str, Any]) -> dict[str, Any]:
    from inheritune_ds.config.corpus import HubSource
    from inheritune_ds.data.documents import sources

    return sources.identify(HubSource.model_validate(source))


def _resolve(name: str, revision: str = "main", repo_type: Any = "model") -> list[str]:
    from inheritune_ds.storage import hub

    found = hub.resolve(name, revision, repo_type)
    return [found.commit, found.offline]


def _snapshot(name: str, patterns: list[str], revision: str = "main") -> dict[str, str]:
    from inheritune_ds.storage import hub

    folder = hub.snapshot(hub.resolve(name, revision, "model"), patterns)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def _pin(folder: str, repo_type: Any, name: str, revision: str = "main") -> str:
    from inheritune_ds.run.pins import pin

    return pin(Path(folder), repo_type, name, revision)


def _locate(model: str, **settings: Any) -> list[Any]:
    from inheritune_ds.config.model import Reference
    from inheritune_ds.surgery.reference import locate

    found = locate(Reference.model_validate({"model": model, **settings}), Path)
    return [str(found.folder), found.commit, found.weights_sha256]


def _tokens(name: str, text: str) -> list[int]:
    from inheritune_ds.data.tokens.tokenizer import load_tokenizer

    return list(load_tokenizer(name)(text)["input_ids"])


def _main() -> None:
    from inheritune_ds.errors import InherituneError
    from inheritune_ds.storage import hub

    hub._BUSY_WAITS_S = (0.05, 0.05)  # of this program; the pauses of the clients stay
    does = {name.removeprefix("_"): function for name, function in globals().items() if name in _WORDS}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ["HF_TOKEN"] = asked.pop("token", "")  # the client looks anew at every request
        try:
            answer = does[asked.pop("what")](**asked)
        except InherituneError as error:
            answer = {"error": type(error).__name__, "exit_code": error.exit_code, "message": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


_WORDS = {"_documents", "_identify", "_resolve", "_snapshot", "_pin", "_locate", "_tokens"}

if __name__ == "__main__":
    _main()
