import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds import cli
from inheritune_ds.config import deepspeed_checks
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.console import Screen, own_screen
from inheritune_ds.errors import RecipeError
from inheritune_ds.storage.files import write_exact, write_json, write_text
from inheritune_ds.storage.redaction import find_secret, redact, redact_document

TOKEN = "canary/Token+0123456789"
PROXY_PASSWORD = "pass-canary-word"
HUB_TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{PROXY_PASSWORD}@proxy:3128")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"token {TOKEN}.", "token ***."),
        (f"password {PROXY_PASSWORD}", "password ***"),
        ("https://me:word@host/path@1.0", "https://***@host/path@1.0"),
        ("https://me:w@rd@host:80", "https://***@host:80"),
        (f"[{HUB_TOKEN}]", "[***]"),
        ("at https://host/a@b?mail=me@here", "at https://host/a@b?mail=me@here"),
        ("hf://datasets/org/name@main/file", "hf://datasets/org/name@main/file"),
        ("https://a.org, then me@here.org", "https://a.org, then me@here.org"),
        ("hf_hub_download, 1 of 2", "hf_hub_download, 1 of 2"),
    ],
)
def test_secrets_are_masked_and_nothing_else(text: str, masked: str) -> None:
    assert redact(text) == masked
    assert (find_secret(text) is None) == (text == masked)


@pytest.mark.parametrize("written", [json.dumps, repr, lambda text: text.replace("/", "%2F").replace("+", "%2B")])
def test_secret_is_masked_in_every_form(written: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    for secret in (TOKEN, "quo\"te\\and's ö"):
        monkeypatch.setenv("SERVICE_SECRET", secret)
        assert "***" in redact(written(secret))
        assert "quo" not in redact(written(secret))


SECRET_NAMES = ["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OUR_PASSWORD", "CLIENT_SECRET", "password", "TOKEN"]
OTHER_NAMES = ["WANDB_PROJECT", "TOKEN_FILE", "TOKENIZERS_PARALLELISM", "SECRETARY"]


@pytest.mark.parametrize("name", [*SECRET_NAMES, *OTHER_NAMES])
def test_secret_variables_are_recognized_by_name(name: str) -> None:
    expected = "it is ***" if name in SECRET_NAMES else "it is 12345678"
    assert redact("it is 12345678", {name: "12345678"}) == expected


def test_the_longer_secret_is_masked_first() -> None:
    assert redact("abcdefgh-tail", {"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh-tail"}) == "***"


def test_document_is_masked_in_keys_and_texts_and_keeps_its_numbers() -> None:
    environ = {"A_TOKEN": "12345678"}
    document = {"a": ["12345678", 12345678, (True, None)], "x12345678": {"b": 1.5}}
    assert redact_document(document, environ) == {"a": ["***", 12345678, [True, None]], "x***": {"b": 1.5}}


def test_written_files_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "text", f"see {TOKEN}")
    write_json(tmp_path / "json", {"command": ["train.py", f"--key={TOKEN}"]})
    assert (tmp_path / "text").read_text() == "see ***"
    assert json.loads((tmp_path / "json").read_text()) == {"command": ["train.py", "--key=***"]}
    monkeypatch.setenv("OUR_PASSWORD", "10240000")
    write_exact(tmp_path / "numbers", "10240000")
    assert (tmp_path / "numbers").read_text() == "10240000"


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        call()
    assert "canary" not in str(caught.value)
    assert HUB_TOKEN not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        document = {**load_recipe("quickstart").model_dump(mode="json"), **changes}
        path = tmp_path / "own.yaml"
        path.write_text(json.dumps(document))
        return str(path)

    return write


ADVICE = """
  allowed: public text: it is written into the run folder, the model card and the tracker
  do: remove it; libraries find secrets in the environment (HF_TOKEN, WANDB_API_KEY, HTTPS_PROXY)"""


def test_recipe_with_a_secret_is_refused(recipe: Callable[..., str]) -> None:
    path = recipe(description=f"with {TOKEN}", unknown_key=1)
    message = refused(lambda: load_recipe(path))
    assert message == f"{path}: description holds the secret of the environment variable HF_TOKEN{ADVICE}"


def test_every_secret_of_a_recipe_is_reported_with_its_key(recipe: Callable[..., str]) -> None:
    sources = [{"kind": "files", "paths": ["a.txt", "https://me:word@host/b.txt"]}]
    path = recipe(corpus={"sources": sources, TOKEN: 1})
    message = refused(lambda: load_recipe(path))
    assert f"{path}: corpus.sources.0.paths.1 holds a URL with user name or password" in message
    assert f"{path}: corpus.*** holds the secret of the environment variable HF_TOKEN" in message


def test_override_with_a_secret_is_refused() -> None:
    message = refused(lambda: load_recipe("quickstart", [f"description=key {HUB_TOKEN}", f"{TOKEN}.a=1"]))
    assert "override description holds a Hugging Face token" in message
    assert "override ***.a holds the secret of the environment variable HF_TOKEN" in message


def test_deepspeed_config_with_a_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"wandb": {"enabled": True, "team": PROXY_PASSWORD}}))
    message = refused(lambda: deepspeed_checks.read(path))
    where = f"DeepSpeed config {path}: wandb.team"
    assert message == f"{where} holds the secret of the environment variable HTTPS_PROXY{ADVICE}"


def test_error_messages_of_the_command_line_are_masked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--key", TOKEN])
    assert cli.main(["plan", "--recipe", f"https://me:word@host/{TOKEN}"]) == 3
    printed = capsys.readouterr()
    assert "unrecognized arguments: --key ***" in printed.err
    assert "'https://***@host/***' cannot be read" in printed.err
    assert "canary" not in printed.err + printed.out


def test_the_screen_masks_only_writes() -> None:
    inner = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stream = Screen(inner, redact)
    assert stream.write(f"a {TOKEN}\n") == len(TOKEN) + 3
    stream.writelines([HUB_TOKEN, " b"])
    stream.flush()
    assert inner.buffer.getvalue() == b"a ***\n*** b"
    assert stream.buffer is inner.buffer
    assert stream.encoding == "utf-8"
    assert not stream.isatty()
    with pytest.raises(io.UnsupportedOperation):
        stream.fileno()


def test_output_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = io.StringIO()
    monkeypatch.setattr(sys, "stdout", inner)
    monkeypatch.setattr(sys, "stderr", inner)
    own_screen(redact)
    own_screen(redact)
    assert isinstance(sys.stdout, Screen)
    assert sys.stdout._stream is inner
    logging.StreamHandler(sys.stderr).handle(logging.makeLogRecord({"msg": f"with {TOKEN}"}))
    assert inner.getvalue() == "with ***\n"


SCRIPT = f"""
import faulthandler, sys, threading, warnings
from inheritune_ds.console import own_screen
from inheritune_ds.storage.redaction import redact
own_screen(redact)
faulthandler.enable()
faulthandler.dump_traceback()
def fail():
    raise ValueError({TOKEN!r})
thread = threading.Thread(target=fail)
thread.start()
thread.join()
warnings.warn({TOKEN!r})
from rich.console import Console
Console(file=sys.stdout).print("rich", {TOKEN!r})
from tqdm import tqdm
for _ in tqdm([1], desc={TOKEN!r}):
    pass
print("last words", {TOKEN!r}, end="")
fail()
"""


def test_tracebacks_warnings_and_libraries_are_masked_in_a_process() -> None:
    source = SCRIPT.replace(repr(TOKEN), "__import__('os').environ['HF_TOKEN'].strip()")  # tracebacks quote the source
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "canary" not in done.stdout + done.stderr
    assert done.stdout == "rich ***\nlast words ***"
    assert "Current thread" in done.stderr
    assert done.stderr.count("ValueError: ***") == 2
    assert "UserWarning: ***" in done.stderr
    assert "***: 100%" in done.stderr
