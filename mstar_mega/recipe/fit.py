"""Optimizer steps with checkpoints: the part that warm-up, PRM training and self-evolving share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from mstar_mega.models.build import build_model
from mstar_mega.models.lmm import LMM
from mstar_mega.platform.distributed import broadcast_object
from mstar_mega.platform.inputs import checked
from mstar_mega.recipe.context import Job, Timer
from mstar_mega.training.batches import TrainGroup
from mstar_mega.training.checkpoint import (
    find_checkpoints,
    load_checkpoint,
    load_latest,
    prune,
    save_checkpoint,
    set_aside,
)
from mstar_mega.training.manifest import DamagedCheckpointError, verify_checkpoint
from mstar_mega.training.trainer import NonFiniteLossError, Trainer, weights_of

STAGES = ("warmup", "prm", "evolve")


@dataclass
class Position:
    """How far a stage is. Written into its checkpoints."""

    iteration: int = 0
    step: int = 0
    """Optimizer steps done in this iteration."""
    total_steps: int = 0
    """Optimizer steps of the policy so far, the warm-up's included."""
    temperature: float | None = None
    """The sampling temperature of the last sweep."""
    barren: int = 0
    """Iterations in a row without anything to train on."""
    drawn_by: str = ""
    """Fingerprint of the policy and the PRM at this iteration's start, which drew and scored its responses."""
    loss_sum: float = 0.0
    """Sum of the losses of this iteration's steps so far."""
    seconds: float = 0.0
    """What these steps took."""
    finished: bool = False

    @property
    def is_new(self) -> bool:
        """Nothing of evolving is done yet."""
        return self.iteration == 1 and self.step == 0

    @property
    def is_inside(self) -> bool:
        """Resumed within an iteration: what comes before its optimizer steps is done, and on disk."""
        return self.step > 0

    def begin_next_iteration(self) -> None:
        """To step 0 of the iteration after this one."""
        self.iteration, self.step, self.loss_sum, self.seconds, self.drawn_by = self.iteration + 1, 0, 0.0, 0.0, ""


_POSITION = TypeAdapter(Position)
_EVENTS = TypeAdapter(Annotated[int, Field(strict=True, ge=0)])


def save(job: Job, trainer: Trainer, stage: str, position: Position) -> None:
    """Write a checkpoint of the stage and delete the oldest beyond ``run.keep_checkpoints``."""
    common = {
        "stage": stage,
        "position": asdict(position),
        "scheduler": trainer.scheduler.state_dict(),
        "metrics": broadcast_object(_logged(job, stage, position)),
    }
    name = _name(position.iteration, position.step)
    save_checkpoint(job.checkpoints / stage, name, trainer.sharded_state(), common)
    # A checkpoint inside an iteration is good only as long as the responses are; without them its start is needed.
    prune(job.checkpoints / stage, job.config.run.keep_checkpoints, needed=[_name(position.iteration, 0)])


def _name(iteration: int, step: int) -> str:
    return f"iteration_{iteration:04d}_step_{step:06d}"


def _logged(job: Job, stage: str, position: Position) -> int:
    """Number of events in the log when ``stage`` stands at ``position``."""
    if not job.muted:
        return job.metrics.position()
    # A lost stage is made again while a later one goes on: its events are in the log, and others behind them.
    before = STAGES[: STAGES.index(stage.removesuffix("_failed"))] + (("annotate",) if stage == "prm" else ())
    return job.metrics.position_after(
        lambda event: (
            event["event"] in ("run", "skipped")
            or (event["event"] == "stage" and event.get("stage") in before)
            or (event["event"] == "step" and event.get("stage") == stage and event["step"] <= position.total_steps)
        )
    )


def restore(job: Job, trainer: Trainer, stage: str) -> Position | None:
    """Load a stage's newest good checkpoint into the trainer; None when it has none."""
    found = load_latest(job.checkpoints / stage, trainer.sharded_state)
    if found is None:
        return None
    state, common, path = found
    trainer.load_state(state, common["scheduler"])
    return _position(common, path)


def restore_weights(job: Job, model: LMM, stage: str) -> Position | None:
    """Load only the weights of a stage's newest good checkpoint into a model that is not trained further."""
    found = load_latest(job.checkpoints / stage, lambda: {"model": model.sharded_state_dict()})
    if found is None:
        return None
    state, common, path = found
    model.load_state_dict(state["model"])
    return _position(common, path)


def load_start(job: Job, policy: Trainer | LMM) -> None:
    """The weights of ``model.checkpoint``, where the settings name one, instead of random ones. Collective."""
    if job.config.model.checkpoint is None:
        return
    path = Path(job.config.model.checkpoint)
    model = policy.model if isinstance(policy, Trainer) else policy
    state, _ = load_checkpoint(path, {"model": model.sharded_state_dict()})
    if isinstance(policy, Trainer):
        policy.load_weights(state["model"])
    else:
        policy.load_state_dict(state["model"])
    job.say(f"   the first weights are those of {path}")


def weights_to_start_from(job: Job, policy: Trainer, start_from: str) -> dict[str, Any] | None:
    """This rank's weights that training goes back to; None for ``last``: it goes on. Collective.

    ``warmup``: those that ``policy`` has now. ``base``: :func:`base_weights`.
    """
    if start_from == "last":
        return None
    return policy.copy_weights() if start_from == "warmup" else base_weights(job)


def base_weights(job: Job) -> dict[str, Any]:
    """This rank's weights before any training, of ``model.checkpoint`` or random. Collective."""
    model = build_model(job.config, job.family, draw=job.config.model.checkpoint is None)
    load_start(job, model)
    return weights_of(model)


@dataclass(frozen=True)
class Standing:
    """What an earlier start of this run left behind."""

    stage: str
    """The stage to go on with."""
    logged: int
    """Events in the log that belong to it; 0: a new run."""
    position: Position | None
    """Of the checkpoint to go on from."""


def find_standing(job: Job, can_resume: Callable[[Position], bool]) -> Standing:
    """How far the run is by its most advanced good checkpoint. Collective.

    Damaged checkpoints are named and set aside, in every stage; so are those inside an iteration of evolving from which
    the job cannot go on.
    """
    newest: Standing | None = None
    for stage in reversed(STAGES):
        for path in broadcast_object(find_checkpoints(job.checkpoints / stage)):
            try:
                common = verify_checkpoint(path)
            except DamagedCheckpointError as error:
                _set_aside(job, path, f"DAMAGED CHECKPOINT: {error}")
                continue
            position = _position(common, path)
            if stage == "evolve" and not can_resume(position):
                lost = f"it needs all responses of iteration {position.iteration}, and some are lost"
                _set_aside(job, path, f"checkpoint {path} cannot be used: {lost}")
                continue
            logged = checked(_EVENTS, common.get("metrics"), f"{path}: the number of events")
            newest = newest or Standing(stage, logged, position)
            break
    return newest or Standing(STAGES[0], 0, None)


def _position(common: dict[str, Any], path: Path) -> Position:
    return checked(_POSITION, common.get("position"), f"{path}: the position")


def _set_aside(job: Job, path: Path, why: str) -> None:
    if job.layout.is_main:
        job.warn(f"{why}. It is set aside as {set_aside(path)}; the run goes on from the one before it")


def note_more_steps(job: Job, stage: str, position: Position, steps: int) -> None:
    """Say that a finished stage trains no further where the settings ask for another number of steps than it took."""
    if position.finished and position.step != steps:
        job.warn(
            f"{stage} ended after {position.step} steps, and the settings now ask for {steps}: it is finished and "
            f"trains nothing more. Use another --run.dir, or remove {job.checkpoints / stage} and what came after it"
        )


def fit(
    job: Job, trainer: Trainer, stage: str, batches: Sequence[Sequence[TrainGroup]], position: Position
) -> float | None:
    """Train on ``batches`` from ``position.step`` on; returns the mean loss of all their steps (None: no step).

    Counts in ``position``, logs each step and writes a checkpoint every ``run.checkpoint_every_steps`` steps. A loss
    that is not finite stops the run with the state before that step saved.
    """
    every = job.config.run.checkpoint_every_steps
    with job.progress.task(f"train {stage}", len(batches), "steps", done=position.step) as task:
        following: Sequence[TrainGroup] | None = None
        for step in range(position.step, len(batches)):
            timer = Timer(job)
            batch = following or batches[step]
            following = batches[step + 1] if step + 1 < len(batches) else None
            for soon in (batch, following or ()):  # images of the next step are decoded during this one
                job.prompt.expect(group.query for group in trainer.share(soon))
            try:
                stats = trainer.step(batch)
            except NonFiniteLossError as error:
                save(job, trainer, f"{stage}_failed", position)
                ids = ", ".join(group.query.id for group in batch[:4])
                raise ValueError(
                    f"{stage} training stopped at iteration {position.iteration}, step {position.step}: {error}. The "
                    f"state before the step is in {job.checkpoints / f'{stage}_failed'}; the batch began with queries "
                    f"{ids}. Look at these queries, or give the same command with a lower {stage}.optimizer.lr and "
                    "--run.allow_changed_settings true: it goes on from the newest checkpoint (delete those whose loss "
                    "is bad already)"
                ) from error
            position.step += 1
            position.total_steps += 1
            position.loss_sum += stats.loss
            position.seconds += timer.seconds
            iteration = position.iteration if stage == "evolve" else None
            fields = {"iteration": iteration, "step": position.total_steps, **asdict(stats), "seconds": timer.seconds}
            job.log("step", stage=stage, **fields)
            task.advance(1, loss=round(stats.loss, 3))
            if position.step % every == 0 and position.step < len(batches):
                save(job, trainer, stage, position)
    return position.loss_sum / position.step if position.step else None
