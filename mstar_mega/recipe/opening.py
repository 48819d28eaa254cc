"""Opening a run: the process group, the run directory, the queries; and the newest policy that lies in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from mstar_mega import functions, kernels
from mstar_mega.config import Config
from mstar_mega.data.prefetch import Ahead
from mstar_mega.data.types import Task
from mstar_mega.models.build import build_family, build_model, check_divisible
from mstar_mega.models.description import MODEL_FILES
from mstar_mega.models.families.base import Family
from mstar_mega.models.lmm import LMM
from mstar_mega.models.packing import prompt_bytes
from mstar_mega.platform import distributed, stopping
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.directory import build_task, check_shared, on_main, run_directory, same_files, shared_data
from mstar_mega.recipe.fit import Position, restore_weights
from mstar_mega.recipe.outside_prm import find_outside_prm
from mstar_mega.report.metrics import METRICS_FILE, MetricsLog, NullMetrics
from mstar_mega.report.progress import Progress
from mstar_mega.report.tensorboard import TensorBoardLog
from mstar_mega.rewards.checker import AnswerChecker


@contextmanager
def open_job(
    config: Config, make_task: Callable[[Config, Path, Family], Task] = build_task, trains: bool = True
) -> Iterator[Job]:
    """Join the process group, take the run directory and prepare the queries; close everything in the end.

    ``trains``: see :func:`run_directory`.
    """
    functions.check(config)  # on every rank: objects of the user's classes travel between them
    distributed.initialize(config.parallel, config.seed)
    kernels.configure(config.kernels)
    place = distributed.layout()
    if config.model.checkpoint is not None:
        check_shared("model.checkpoint", Path(config.model.checkpoint), holds=f"{MODEL_FILES}/config.json")
    family = build_family(config)
    check_divisible(config, family.vision, family.language)
    if trains and config.prm.checkpoint is not None:
        find_outside_prm(config)  # what is wrong with it is told before any work begins
    with ExitStack() as stack:
        stack.enter_context(stopping.listening())
        stack.enter_context(distributed.watched(60 * config.run.hang_minutes))
        directory = stack.enter_context(run_directory(config, place.is_main, trains))
        metrics: MetricsLog | NullMetrics = NullMetrics()

        def open_log() -> None:
            nonlocal metrics
            metrics = MetricsLog(directory / METRICS_FILE, TensorBoardLog(directory / "tensorboard"))

        on_main(place.is_main, open_log)
        stack.callback(metrics.close)
        damage = metrics.damage if isinstance(metrics, MetricsLog) else []

        def find_queries() -> Task:
            with same_files(config, directory) if trains else nullcontext():
                return make_task(config, directory, family)

        task = on_main(place.is_main, find_queries)
        for name, path in shared_data(config).items():
            check_shared(name, path, writes=name == "data.dir")
        progress = stack.enter_context(Progress(place.is_main))
        checker = stack.enter_context(AnswerChecker())
        prompt = Ahead(family.prompt, prompt_bytes, config.data.workers, config.data.prefetch_mb << 20)
        stack.callback(prompt.close)
        for problem in damage[:3]:
            progress.say(f"WARNING: DAMAGED LOG, that event is lost: {problem}. The log as it was is beside it")
        yield Job(config, directory, place, family, prompt, task, metrics, progress, checker)
    distributed.shutdown()


def newest_policy(job: Job) -> tuple[LMM, Position]:
    """The most advanced policy of the run directory, and how far it is (the warm-up policy is before iteration 1)."""
    model = build_model(job.config, job.family, draw=False)
    position = restore_weights(job, model, "evolve")
    if position is None and restore_weights(job, model, "warmup") is None:
        raise ValueError(f"{job.dir} has no policy yet: run `mstar warmup` or `mstar evolve` with this run.dir first")
    return model, position or Position(iteration=1)
