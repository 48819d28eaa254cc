"""Optimizer steps with checkpoints: the part that warm-up, PRM training and self-evolving share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from mstar_mega.models.build import build_model
from mstar_mega.models.lmm import LMM
from mstar_mega.platform import stopping, watch
from mstar_mega.platform.distributed import broadcast_object
from mstar_mega.platform.inputs import checked
from mstar_mega.recipe.context import Job, Timer
from mstar_mega.recipe.directory import on_main
from mstar_mega.training.batches import TrainGroup
from mstar_mega.training.checkpoint import (
    find_checkpoints,
    load_checkpoint,
    load_latest,
    prune,
    save_checkpoint,
    set_aside,
)
from mstar_mega.training.manifest import DamagedCheckpointError, read_manifest, verify_checkpoint
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
    refreshed: int = 0
    """The iteration after which the PRM in use was refreshed; 0: it is the one trained before evolving."""
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
    name, folder = _name(position.iteration, position.step), checkpoint_folder(job, stage, position.iteration)
    watch.beat(f"saving checkpoint {name} of {stage}")
    save_checkpoint(folder, name, trainer.sharded_state(), common)
    # A checkpoint inside an iteration is good only as long as the responses are; without them its start is needed.
    prune(folder, job.config.run.keep_checkpoints, needed=[_name(position.iteration, 0)])


def checkpoint_folder(job: Job, stage: str, iteration: int = 0) -> Path:
    """Where a stage's checkpoints lie; the PRM that is refreshed after an iteration has a folder of its own."""
    return job.checkpoints / (f"{stage}_{iteration:04d}" if stage == "prm" and iteration else stage)


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


def restore(job: Job, trainer: Trainer, stage: str, iteration: int = 0) -> Position | None:
    """Load a stage's newest good checkpoint into the trainer; None when it has none.

    ``iteration``: see :func:`checkpoint_folder`.
    """
    found = load_latest(checkpoint_folder(job, stage, iteration), trainer.sharded_state)
    if found is None:
        return None
    state, common, path = found
    trainer.load_state(state, common["scheduler"])
    return _position(common, path)


def restore_weights(job: Job, model: LMM, stage: str, iteration: int = 0) -> Position | None:
    """Load only the weights of a stage's newest good checkpoint into a model that is not trained further.

    ``iteration``: see :func:`checkpoint_folder`.
    """
    is_held = job.dir == Path(job.config.run.dir)  # and not another run, in which a job may be at work
    folder = checkpoint_folder(job, stage, iteration)
    found = load_latest(folder, lambda: {"model": model.sharded_state_dict()}, tidy=is_held)
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

    Damaged checkpoints are named and set aside, in every stage; so are those of evolving from which the job cannot go
    on, because responses (``can_resume``) or the refreshed PRM are lost.
    """
    newest: Standing | None = None
    for stage in reversed(STAGES):
        for position, logged, path in _good_checkpoints(job, checkpoint_folder(job, stage)):
            lost = _lost(job, position, can_resume) if stage == "evolve" else ""
            if lost:
                _set_aside(job, path, f"checkpoint {path} cannot be used: it needs {lost}")
                continue
            newest = newest or Standing(stage, logged, position)
            break
    return _with_refresh(job, newest or Standing(STAGES[0], 0, None))


def _good_checkpoints(job: Job, folder: Path) -> Iterator[tuple[Position, int, Path]]:
    """(position, events logged until then, path), the newest first; damaged ones are named and set aside."""
    for path in broadcast_object(find_checkpoints(folder)):
        try:
            common = verify_checkpoint(path)
        except DamagedCheckpointError as error:
            _set_aside(job, path, f"DAMAGED CHECKPOINT: {error}")
            continue
        logged = checked(_EVENTS, common.get("metrics"), f"{path}: the number of events")
        yield _position(common, path), logged, path


def _lost(job: Job, position: Position, can_resume: Callable[[Position], bool]) -> str:
    """What the checkpoint of evolving at this position cannot go on without; empty where nothing is lost."""
    if not can_resume(position):
        return f"all responses of iteration {position.iteration}, and some are lost"
    if position.refreshed:
        folder = checkpoint_folder(job, "prm", position.refreshed)
        newest = next(_good_checkpoints(job, folder), None)
        if newest is None or not newest[0].finished:
            return f"the PRM in {folder}, and that is lost"
    return ""


def _with_refresh(job: Job, standing: Standing) -> Standing:
    """The standing at an iteration's start goes on behind what of a refresh there is; later refreshes are undone."""
    position = standing.position if standing.stage == "evolve" else None
    before = -1 if position is None else position.iteration - 1
    for iteration in broadcast_object(refreshes(job)):
        if iteration > before:
            _remove(job, checkpoint_folder(job, "prm", iteration))
    if position is None or position.step or not before:
        return standing
    newest = next(_good_checkpoints(job, checkpoint_folder(job, "prm", before)), None)
    return standing if newest is None else replace(standing, logged=max(standing.logged, newest[1]))


def refreshes(job: Job) -> list[int]:
    """The iterations after which the PRM was refreshed, or began to be, as far as their checkpoints are kept."""
    return sorted(_refresh_folders(job.checkpoints))


def _refresh_folders(checkpoints: Path) -> dict[int, Path]:
    return {int(path.name[4:]): path for path in checkpoints.glob("prm_*") if path.name[4:].isdigit()}


def finished_prm(checkpoints: Path) -> Path | None:
    """The checkpoint of the last PRM that a run finished, refreshed ones included; None: it has none."""
    folders = _refresh_folders(checkpoints)
    for folder in [*(folders[iteration] for iteration in sorted(folders, reverse=True)), checkpoints / "prm"]:
        for path in find_checkpoints(folder)[:1]:
            manifest, problem = read_manifest(path)
            if not problem and _position(manifest["common"], path).finished:
                return path
    return None


def forget_old_refreshes(job: Job) -> None:
    """Delete the refreshed PRMs that no kept checkpoint of evolving needs. Acts on global rank 0 only."""
    # Those span as many iterations as are kept, and one more: its start.
    for iteration in refreshes(job)[: -(job.config.run.keep_checkpoints + 1)]:
        _remove(job, checkpoint_folder(job, "prm", iteration))


def _remove(job: Job, folder: Path) -> None:
    if job.layout.is_main:
        doomed = folder.with_name(f".{folder.name}.old")  # at once: half of it must not look like a whole
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def steps_taken(job: Job, stage: str, iteration: int = 0) -> int:
    """Optimizer steps of a finished stage by its newest checkpoint, which has been verified. Collective."""

    def read() -> int:
        newest = find_checkpoints(checkpoint_folder(job, stage, iteration))[0]
        manifest, _ = read_manifest(newest)
        return _position(manifest["common"], newest).total_steps

    return int(on_main(job.layout.is_main, read))


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
    that is not finite stops the run with the state before that step saved. Asked to stop, it saves after the step in
    hand.
    """
    every = job.config.run.checkpoint_every_steps
    with job.progress.task(f"train {stage}", len(batches), "steps", done=position.step) as task:
        following: Sequence[TrainGroup] | None = None
        for step in range(position.step, len(batches)):
            timer = Timer(job)
            watch.beat(f"{stage} training, step {step + 1} of {len(batches)}")
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
            fields = {"iteration": position.iteration or None, "step": position.total_steps, **asdict(stats)}
            job.log("step", stage=stage, **fields, seconds=timer.seconds)
            task.advance(1, loss=round(stats.loss, 3))
            stops = stopping.agreed()
            if stops or (position.step % every == 0 and position.step < len(batches)):
                save(job, trainer, stage, position)
            stopping.leave_if(stops)
    return position.loss_sum / position.step if position.step else None
