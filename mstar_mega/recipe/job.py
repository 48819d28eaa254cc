"""One run of the recipe, from settings to report; the same call resumes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

from mstar_mega.config import Config
from mstar_mega.data.screen import MAX_BYTES, problem_of, readable_image
from mstar_mega.data.types import ImageRef, Query, image_digest
from mstar_mega.platform.distributed import barrier, broadcast_object, devices_in_words
from mstar_mega.platform.inputs import read_input
from mstar_mega.recipe.context import Job, Timer
from mstar_mega.recipe.directory import build_task, on_main
from mstar_mega.recipe.evaluate import exploration_in_words
from mstar_mega.recipe.fit import STAGES, Standing, find_standing
from mstar_mega.recipe.generate import can_resume
from mstar_mega.recipe.intervals import next_interval
from mstar_mega.recipe.method import needs_prm, resolve_method
from mstar_mega.recipe.opening import open_job
from mstar_mega.recipe.rollouts import gather_groups
from mstar_mega.recipe.session import Session
from mstar_mega.report.accounting import generated, in_words
from mstar_mega.report.html import write_report
from mstar_mega.report.metrics import METRICS_FILE, comparable, read_metrics
from mstar_mega.report.run import load_run
from mstar_mega.report.summary import write_summary
from mstar_mega.settings import differences, load
from mstar_mega.training.checkpoint import find_checkpoints


def run(config: Config, until: str | None = None) -> None:
    """Run the recipe up to and including a stage (``warmup``, ``annotate``, ``prm``), or all of it and the report."""
    with open_job(config) as job:
        job.say(devices_in_words())
        standing = find_standing(job, lambda position: can_resume(job, position))
        if _is_done(job, standing, until):
            job.say(f"{job.dir}: {until or 'everything'} is done already")
        else:
            on_main(job.layout.is_main, lambda: job.metrics.rewind(standing.logged))
            if standing.logged:
                job.say(f"Resuming {job.dir} in stage {standing.stage}")
            _log_start(job)
            timer = Timer(job)
            run_stages(job, standing, until)
            if until is None:
                job.log("stage", stage="total", seconds=timer.seconds)
        if until is None:
            finish(job)


def _is_done(job: Job, standing: Standing, until: str | None) -> bool:
    """Nothing is left to do, so the log must stay as it is."""
    if until is not None:
        # A later stage says nothing of these two: SFT needs neither.
        makes_prm = until in ("annotate", "prm") and job.config.prm.checkpoint is None
        reached = find_checkpoints(job.checkpoints / "prm") if makes_prm else True
        return broadcast_object(bool(reached)) and STAGES.index(standing.stage) > (1 if until == "prm" else 0)
    ended = job.metrics.position_after(lambda event: event["event"] == "stage" and event.get("stage") == "total")
    if not broadcast_object(0 < ended == job.metrics.position()) or standing.stage != "evolve":
        return False
    assert standing.position is not None
    return next_interval(job, resolve_method(job.config.evolve), standing.position) is None


def run_stages(job: Job, standing: Standing, until: str | None) -> None:
    """The recipe's stages in order; those before the resumed one pass quietly."""
    session = Session(job, standing)
    if until is None:
        _check_budget(job.config.evolve.max_steps, session.warmup_steps)
    session.warmup()
    if until == "warmup":
        return
    if session.from_outside and (until is not None or needs_prm(job.config)):
        with job.quiet(session.reached > 1):
            job.say(f"   the PRM is {job.config.prm.checkpoint}: nothing is annotated, and no PRM is trained")
        if until is not None:
            return
    if not session.find_prm() and (needs_prm(job.config) or until in ("annotate", "prm")):
        groups = session.annotate()
        if until == "annotate":
            return
        session.train_prm(groups)
    if until == "prm":
        return
    session.evolve()


def _check_budget(budget: int, steps: int) -> None:
    """Raise ValueError where the warm-up's steps alone would use up the step budget."""
    if 0 < budget <= steps:
        raise ValueError(
            f"evolve.max_steps {budget} includes the warm-up's {steps} steps, so nothing is left to evolve with; use "
            f"more than {steps}, or 0 and evolve.passes"
        )


def finish(job: Job) -> None:
    """Write summary.json and report.html and say where they are."""
    if job.layout.is_main:
        summary = write_summary(job.dir)
        job.say(in_words(generated(load_run(job.dir))))
        job.say(f"summary: {summary}")
        try:
            job.say(f"report:  {write_report(job.dir)}")
        except OSError:
            raise
        except Exception as error:  # what a page cannot show is no reason to call the run a failure
            job.warn(f"{job.dir} has no page: {type(error).__name__}: {error} (`mstar report {job.dir}` tries again)")
    barrier()


def evaluate(config: Config) -> None:
    """Measure the newest policy of a run directory on its validation and test queries, and print the figures.

    With other settings than the run's the responses get directories of their own.
    """
    with open_job(config, trains=False) as job, job.quiet(True):
        session = Session.of_newest(job)
        session.find_prm()
        greedy, exploration = session.measure("_changed" if differences(load(job.dir), config) else "")
        for split, accuracy in greedy.items():
            job.progress.say(f"{split}: greedy accuracy {100 * (accuracy or 0.0):.1f}%")
        job.progress.say(f"validation: {exploration_in_words(exploration)}")


def warmup_data(config: Config) -> None:
    """Make a warm-up set from the labelled queries with the weights that a run would start from."""
    config = replace(config, data=replace(config.data, warmup_file=None))  # it may name the set that is to be made
    with open_job(config, partial(build_task, warms_up=False)) as job, job.quiet(True):
        Session.of_start(job).make_warmup_set()


def generate(config: Config, question: str, images: Sequence[str], responses: int, temperature: float) -> None:
    """Print sampled responses of a run's newest policy to a question about images."""
    refs = tuple(map(_given_image, images))
    with open_job(config, trains=False) as job, job.quiet(True):
        session = Session.of_newest(job)
        query = Query("question", question, refs, None)
        if not refs:
            job.progress.say("NOTE: there is no image (--image FILE): the policy answers from the question alone")
        (group,) = gather_groups(session.generate([query], responses, temperature, "generate"))
        for response in group.responses:
            cut = " (cut at the length limit)" if response.truncated else ""
            job.progress.say(f"--- response {response.index + 1}{cut}\n{response.text}")


def _given_image(path: str) -> ImageRef:
    """A file that a training set would take as well. Raises ValueError that says why it would not."""
    content = read_input(path, MAX_BYTES)
    if problem := problem_of(lambda: readable_image(content)):
        raise ValueError(f"--image {path}: {problem}")
    return ImageRef(path, image_digest(content))


def _log_start(job: Job) -> None:
    """The first event of a run and of each start in another layout, and an event for every query that is left out."""
    place = job.layout
    parallel = {"tensor": place.tensor_size, "pipeline": place.pipeline_size, "data": place.data_size}
    parallel |= {name: getattr(job.config.parallel, name) for name in ("sequence", "distributed_optimizer")}
    before = read_metrics(job.dir / METRICS_FILE) if place.is_main else []
    logged = comparable(event for event in before if event["event"] in ("run", "skipped"))
    starts = [event["parallel"] for event in logged if event["event"] == "run"]
    if starts[-1:] != [parallel]:
        job.log("run", world_size=place.world_size, parallel=parallel)
    if starts and starts[-1] != parallel:
        job.say(f"NOTE: the layout is {_layout_words(parallel)}; the start before it had {_layout_words(starts[-1])}")
    for name, (used, whole) in job.task.cut.items():
        if name != "data.unlabelled_queries" or job.config.prompts.unlabelled != "none":
            job.say(f"NOTE: {name} takes {used} of {whole}; null: all")
    events = [{"event": "skipped", **asdict(skipped)} for skipped in job.task.skipped]
    for event in events:
        if event not in logged:  # damaged since an earlier start
            job.log(**event)
    if events:
        shown = "; ".join(f"{each.what} ({each.where}: {each.reason})" for each in job.task.skipped[:3])
        job.warn(f"{len(events)} queries are left out: {shown}{' ...' if len(events) > 3 else ''}")


def _layout_words(parallel: Mapping[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in parallel.items())
