"""Weights & Biases: started once per run, never the end of it."""

import netrc
import os
import secrets
from pathlib import Path
from typing import Any, Literal

from inheritune_ds.config.recipe import Recipe
from inheritune_ds.storage.files import write_text
from inheritune_ds.tracking.metrics import METRICS_FILE, TOKENS

_WANDB_HOST = "api.wandb.ai"


def start_wandb(run_dir: Path, recipe: Recipe) -> Any | None:
    """Start the W&B run of this run folder; None (said in one line) when W&B cannot start."""
    # W&B reports its own crashes over the network, offline runs included; a run talks to nobody unasked.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            # No secret leaves: not the command line, the environment, the code, or the machine's description.
            save_code=False,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            x_disable_stats=True,
            # An unreachable server costs this much, once, and no more at the end.
            init_timeout=30.0,
            login_timeout=30.0,
            finish_timeout=60.0,
        )
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or recipe.logging.wandb_project,
            name=os.environ.get("WANDB_NAME") or recipe.name,
            id=_wandb_id(run_dir),
            dir=str(run_dir),
            config=recipe.model_dump(mode="json"),
            mode=_wandb_mode(),
            resume="allow",
            settings=settings,
        )
        run.define_metric(TOKENS)
        run.define_metric("*", step_metric=TOKENS)
    except Exception as error:  # noqa: BLE001 (whatever W&B raises: metrics.jsonl is enough to go on)
        say_lost("could not start", error)
        return None
    if run.offline:
        print(f"W&B: offline; to upload later: wandb sync {run_dir}/wandb/offline-run-*", flush=True)
    elif run.url:
        print(f"W&B: {run.url}", flush=True)
    return run


def say_lost(what: str, error: Exception) -> None:
    """Print that W&B failed, and why; the run continues."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    print(f"W&B {what}: {reason}. The run goes on; {METRICS_FILE} holds every metric.", flush=True)


def _wandb_id(run_dir: Path) -> str:
    """Return the W&B id of a run folder: WANDB_RUN_ID or a new one, then always the same."""
    path = run_dir / "wandb_id"
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    identity = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_text(path, f"{identity}\n")
    return identity


def _wandb_mode() -> Literal["online", "offline"] | None:
    """Online when W&B is configured; None, which leaves the choice to WANDB_MODE, when that is set."""
    if os.environ.get("WANDB_MODE"):
        return None
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        known = netrc.netrc(path).authenticators(_WANDB_HOST) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        known = False
    return "online" if known else "offline"
