"""Checkpoints inside run directories."""

from __future__ import annotations

from pathlib import Path

from mstar_mega import settings
from mstar_mega.config import Config
from mstar_mega.platform.inputs import refuse_links_out
from mstar_mega.training.checkpoint import find_checkpoints
from mstar_mega.training.manifest import MANIFEST


def newest_policy(path: Path) -> Path:
    """A checkpoint directory as it is; of a run directory the newest checkpoint of the policy.

    Raises ValueError where there is none.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such directory; expected a checkpoint or a run directory")
    if (path / "config.json").is_file() and not (path / MANIFEST).exists():
        raise ValueError(
            f"{path} is a Hugging Face directory, not a checkpoint: `mstar convert hf-to-megatron --hf {path} --out "
            "DIR` goes the other way and makes a checkpoint of it"
        )
    if not (path / "checkpoints").is_dir():
        return path
    refuse_links_out(path / "checkpoints", "what it leads to would be published with the model")
    for stage in ("evolve", "warmup"):
        if found := find_checkpoints(path / "checkpoints" / stage):
            return found[0]
    raise ValueError(f"{path} is a run directory without a finished checkpoint of the policy")


def run_config(checkpoint: Path) -> Config | None:
    """Settings of the run directory that a checkpoint lies in; None where it lies in none."""
    run = checkpoint.absolute().parents[2] if len(checkpoint.absolute().parents) > 2 else checkpoint
    if checkpoint.absolute().parents[1].name != "checkpoints" or not (run / settings.CONFIG_FILE).is_file():
        return None
    return settings.load(run)
