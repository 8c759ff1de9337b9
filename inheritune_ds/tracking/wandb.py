"""Weights & Biases: one W&B run per run folder; its errors never end a run."""

import logging
import netrc
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ValidationError

from inheritune_ds.config.recipe import Recipe
from inheritune_ds.storage.files import write_text
from inheritune_ds.tracking.metrics import METRICS_FILE, TOKENS

logger = logging.getLogger(__name__)

START_S = 30.0
"""Seconds until a server counts as unreachable."""
_Mode = Literal["online", "offline", "disabled"]
_TRUE = ("1", "on", "yes", "true")
"""Values of Hugging Face's WANDB_DISABLED (transformers.utils.generic, ENV_VARS_TRUE_VALUES)."""
_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""W&B's own servers, the old and the present name."""


class WandbCopy:
    """The copy of metrics.jsonl on W&B; logs W&B's errors, and the run continues without it.

    A run folder is one W&B run over all launches; the recipe is its config.
    """

    def __init__(self, run_dir: Path, recipe: Recipe) -> None:
        self._run = _start(run_dir, recipe)

    def log(self, row: Mapping[str, float]) -> None:
        """Send a row."""
        try:
            if self._run is not None:
                self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        except Exception as error:  # noqa: BLE001 (see the class)
            self._run = None
            _log_failure("stopped", error)

    def close(self) -> None:
        """Finish the W&B run; a second call does nothing."""
        run, self._run = self._run, None
        try:
            if run is not None:
                run.finish()
        except Exception as error:  # noqa: BLE001 (see the class)
            _log_failure("did not finish", error)


def _start(run_dir: Path, recipe: Recipe) -> Any | None:
    """Start the W&B run of this run folder, offline if the server does not answer; None when W&B cannot start.

    It logs one line.
    """
    # W&B would report its own crashes over the network, even in offline runs.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    mode = _wandb_mode()
    try:
        run, reason = _init(run_dir, recipe, mode), ""
    except Exception as error:  # noqa: BLE001 (metrics.jsonl is enough)
        run, reason = _start_offline(run_dir, recipe, error), f" ({_reason(error)})"
    if run is None:
        return None
    if run.offline:
        logger.info("W&B: offline%s; to upload later: wandb sync %s/wandb/offline-run-*", reason, run_dir)
    elif run.url:
        logger.info("W&B: %s", run.url)
    return run


def _start_offline(run_dir: Path, recipe: Recipe, first: Exception) -> Any | None:
    """Start an offline run after a failed start; log the first error and return None if that fails, too."""
    try:
        import wandb

        wandb.teardown()  # W&B's service keeps the id of the failed run in use
        return _init(run_dir, recipe, "offline")
    except Exception:  # noqa: BLE001 (see _start)
        _log_failure("could not start", first)
        return None


def _init(run_dir: Path, recipe: Recipe, mode: _Mode | None) -> Any:
    import wandb

    # It would import W&B Launch, which takes seconds, to look for inputs of a launched job; there are none.
    wandb.Run._detect_and_apply_job_inputs = lambda self: None  # type: ignore[method-assign]  # noqa: ARG005, SLF001
    settings = wandb.Settings(
        console="off",
        silent=True,
        # Secrets stay here: the command line, the environment, the code, the machine's description.
        save_code=False,
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_disable_stats=True,
        # The most that an unreachable server costs.
        init_timeout=START_S,
        login_timeout=START_S,
        finish_timeout=60.0,
    )
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or recipe.logging.wandb_project,
        name=os.environ.get("WANDB_NAME") or recipe.name,
        id=_wandb_id(run_dir),
        dir=str(run_dir),
        config=recipe.model_dump(mode="json"),
        mode=mode,
        resume="allow",
        settings=settings,
    )
    run.define_metric(TOKENS)
    run.define_metric("*", step_metric=TOKENS)
    return run


def _log_failure(what: str, error: Exception) -> None:
    logger.info("W&B %s: %s. The run continues; %s holds every metric.", what, _reason(error), METRICS_FILE)


def _reason(error: Exception) -> str:
    """The first line of an error; for an invalid setting its environment variable, too."""
    if isinstance(error, ValidationError):
        item = error.errors()[0]
        given = (name for name, value in os.environ.items() if name.startswith("WANDB_") and value == item["input"])
        return f"{next(given, item['loc'][0])}={item['input']}: {item['msg']}"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _wandb_id(run_dir: Path) -> str:
    """The W&B id of a run folder: WANDB_RUN_ID or a new one at first, then always the same."""
    path = run_dir / "wandb_id"
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    identity = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_text(path, f"{identity}\n")
    return identity


def _wandb_mode() -> _Mode | None:
    """Online when W&B is configured; None when WANDB_MODE decides."""
    if os.environ.get("WANDB_DISABLED", "").lower() in _TRUE:
        return "disabled"
    if os.environ.get("WANDB_MODE"):
        return None
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    with suppress(OSError, ValueError, netrc.NetrcParseError):
        known, own = netrc.netrc(path), urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname
        return "online" if any(host in known.hosts for host in (*_HOSTS, own)) else "offline"
    return "offline"
