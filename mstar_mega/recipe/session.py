"""The recipe step by step, for the command line and for programs of one's own (docs/api.md).

A session holds the policy, its optimizer and the PRM of one open run. Its stages are the job's: what the run directory
holds of them already is read back. Its small steps (generate, reward, score, select, train) are the iteration's, on
queries of the caller's choice; they keep nothing on disk but what :meth:`Session.save` writes.

Under torchrun every rank makes the same calls. Groups are this data-parallel rank's share; figures are the whole job's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from mstar_mega.data.types import Group, Query, Task
from mstar_mega.evaluation.passk import Exploration, greedy_accuracy, measure
from mstar_mega.kernels.noise import key_of
from mstar_mega.models.build import build_model
from mstar_mega.models.lmm import LMM
from mstar_mega.platform.distributed import all_gather_objects, barrier
from mstar_mega.recipe.annotate import annotate
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.evaluate import Split, measure_exploration, measure_greedy, split_queries
from mstar_mega.recipe.evolve import evolve
from mstar_mega.recipe.fit import STAGES, Position, Standing, load_start, save
from mstar_mega.recipe.method import needs_prm
from mstar_mega.recipe.opening import newest_policy
from mstar_mega.recipe.prm import load_prm, train_prm
from mstar_mega.recipe.rollouts import Actors, Sampling, gather_groups, judge, sample_groups, score_responses
from mstar_mega.recipe.warmup import warmup, warmup_batches
from mstar_mega.recipe.warmup_data import make_warmup_set
from mstar_mega.rewards.reader import PRM
from mstar_mega.rewards.selection import select, weight_of
from mstar_mega.training.batches import Batches, Examples, TrainGroup, split_into_epochs
from mstar_mega.training.trainer import StepStats, Trainer

SPLITS: tuple[Split, ...] = ("validation", "test")


class Session:
    """One run of the recipe, open on every rank."""

    def __init__(self, job: Job, standing: Standing | None = None, model: LMM | None = None) -> None:
        """``standing``: how far an earlier start came; ``model``: a policy to look at, not to train."""
        self.job = job
        self.standing = standing or Standing(STAGES[0], 0, None)
        self.position = Position(iteration=1)
        """Of the small steps' training: what :meth:`save` notes."""
        self._steps = 0
        self._model = model

    @classmethod
    def of_newest(cls, job: Job) -> Session:
        """Of the newest policy of a run directory, to look at. Raises ValueError where there is none."""
        model, position = newest_policy(job)
        session = cls(job, Standing(STAGES[-1], 0, position), model)
        session.position = position
        return session

    @classmethod
    def of_start(cls, job: Job) -> Session:
        """Of the weights that a run would start from, to look at."""
        model = build_model(job.config, job.family, draw=job.config.model.checkpoint is None)
        load_start(job, model)
        return cls(job, model=model)

    @property
    def task(self) -> Task:
        """The run's queries."""
        return self.job.task

    @property
    def prm(self) -> PRM | None:
        """The process reward model, once it is there."""
        return self.actors.prm

    @property
    def reached(self) -> int:
        """Number of the stage that an earlier start had come to."""
        return STAGES.index(self.standing.stage)

    @property
    def from_outside(self) -> bool:
        """Whether the PRM is one that the settings bring along."""
        return self.job.config.prm.checkpoint is not None

    @cached_property
    def policy(self) -> Trainer:
        """The policy with its optimizer, from the start's weights."""
        config = self.job.config
        model = self._model or build_model(config, self.job.family, draw=config.model.checkpoint is None)
        return Trainer(model, config.warmup.optimizer, self.job.prompt, self.warmup_steps, config.parallel)

    @cached_property
    def actors(self) -> Actors:
        """Who generates and who scores."""
        return Actors(self.job, self._model or self.policy.model, None)

    @cached_property
    def _warmup_batches(self) -> Batches:
        return warmup_batches(self.job)

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return len(self._warmup_batches)

    # -- the stages ------------------------------------------------------------------------------------------------

    def warmup(self) -> None:
        """Train the warm-up policy on written-out chains of thought, or read it back, and measure it."""
        with self.job.quiet(self.reached > 0):
            self._steps = warmup(self.job, self.policy, self._warmup_batches).total_steps
        self.position = Position(iteration=1, total_steps=self._steps)

    def annotate(self) -> list[Group]:
        """This rank's share of annotated queries, with Monte-Carlo labels on every step."""
        with self.job.quiet(self.reached > 0):
            return annotate(self.job, self.actors)

    def train_prm(self, groups: Sequence[Group]) -> None:
        """Train the PRM on annotated groups, or read it back, and measure it."""
        with self.job.quiet(self.reached > 1):
            self.actors.use_prm(train_prm(self.job, self.actors.policy, groups))

    def find_prm(self) -> bool:
        """Take the PRM that is there already, trained by an earlier start or brought along; returns whether one is."""
        refreshed = self.standing.position.refreshed if self.standing.position is not None else 0
        if needs_prm(self.job.config) and (self.from_outside or self.reached > 1):
            self.actors.use_prm(load_prm(self.job, self.actors.policy, refreshed))
        return self.actors.prm is not None

    def evolve(self) -> None:
        """The recipe's loop until the budget is spent."""
        settings = self.job.config.evolve
        with self.job.stage("evolve"):
            # The budget includes the warm-up's steps.
            self.policy.reconfigure(settings.optimizer, max(0, settings.max_steps - self._steps))
            self.position = evolve(self.job, self.policy, self.actors, self._steps)

    # -- the small steps -------------------------------------------------------------------------------------------

    def generate(
        self,
        queries: Sequence[Query],
        responses: int | None = None,
        temperature: float | None = None,
        name: str = "own",
    ) -> list[Group]:
        """Sampled responses of this rank's share of the queries, split into steps; not judged, not scored.

        ``responses``, ``temperature``: None: those of training (``evolve.responses``, ``temperature.value``).
        ``name`` names the random numbers: the same name, weights and queries give the same responses.
        """
        config, place = self.job.config, self.job.layout
        sampling = Sampling(
            name,
            config.temperature.value if temperature is None else temperature,
            config.evolve.responses if responses is None else responses,
        )
        mine = list(queries[place.data_rank :: place.data_size])
        size = config.generation.queries_per_block
        blocks = [mine[i : i + size] for i in range(0, len(mine), size)]
        return [group for block in blocks for group in sample_groups(self.job, self.actors.engine, block, sampling)]

    def reward(self, groups: Sequence[Group]) -> None:
        """Judge every response's answer, in place (``reward.function``)."""
        judge(self.job, groups)

    def score(self, groups: Sequence[Group]) -> None:
        """Score every step and response by the PRM, in place. Raises ValueError where there is no PRM yet."""
        if self.actors.prm is None:
            raise ValueError("there is no process reward model yet: call find_prm() or train_prm(annotate()) first")
        score_responses(self.job, self.actors.prm, groups)

    def select(self, groups: Sequence[Group], name: str = "own") -> Examples:
        """What the selection takes of judged and scored groups of all ranks (``selection.rule``, ``selection.weight``).

        ``name`` names the random numbers of a random rule.
        """
        settings = self.job.config.selection
        key = key_of(self.job.config.seed, "select", name)
        mine = [
            TrainGroup(
                group.query,
                [response.tokens for response in chosen],
                weights=None if settings.weight == "none" else [weight_of(group, r, settings) for r in chosen],
            )
            for group, chosen in zip(groups, select(groups, settings, key, self.task.check_reasoning), strict=True)
            if chosen
        ]
        everyone = [group for part in all_gather_objects(mine) for group in part]
        return Examples.of(sorted(everyone, key=lambda group: group.query.id))

    def train(self, examples: Examples, epochs: float = 1.0) -> list[StepStats]:
        """Optimizer steps on all examples by ``evolve.optimizer``, one after another; what each of them did."""
        if self.policy.config is not self.job.config.evolve.optimizer:
            budget = self.job.config.evolve.max_steps
            self.policy.reconfigure(self.job.config.evolve.optimizer, max(0, budget - self.position.total_steps))
        key = (self.job.config.seed, "own", self.position.total_steps)
        done = []
        for batch in split_into_epochs(examples, self.policy.config, epochs, key):
            self.job.prompt.expect(group.query for group in self.policy.share(batch))
            done.append(self.policy.step(batch))
            self.position.total_steps += 1
        return done

    def evaluate(self, split: Split | Sequence[Query] = "validation") -> float:
        """Greedy accuracy on a split's queries, or on queries of one's own, as a share. Raises ValueError for none."""
        groups = self._judged(split, 1, 0.0)
        accuracy = greedy_accuracy(groups)
        if accuracy is None:
            raise ValueError("there are no queries to evaluate on")
        return accuracy

    def explore(self, split: Split | Sequence[Query] = "validation") -> Exploration:
        """Pass@K, and Reward-Pass@K where there is a PRM, of responses at temperature 1 (``evaluation.k``)."""
        settings = self.job.config.evaluation
        groups = self._judged(split, settings.k, 1.0)
        return measure(groups, settings.k, settings.reward_k, self.job.config.selection.distinct)

    def measure(self, at: str = "") -> tuple[dict[Split, float | None], Exploration]:
        """Greedy accuracy by split, and exploration, of the newest policy: what ``mstar evaluate`` does.

        Unlike :meth:`evaluate` the responses and figures are kept in the run directory. ``at`` sets those of other
        settings apart.
        """
        position = self.position
        at = (f"_step_{position.step:06d}" if position.step else "") + at
        done = position.iteration if position.step else position.iteration - 1
        greedy: dict[Split, float | None] = {}
        for split in SPLITS:
            greedy[split] = measure_greedy(self.job, self.actors, "evaluate", done, split, at)
        return greedy, measure_exploration(self.job, self.actors, "evaluate", done, at)

    def make_warmup_set(self) -> Path:
        """Let the policy write reasoning to the labelled queries' gold answers; see :mod:`.warmup_data`."""
        return make_warmup_set(self.job, self.actors)

    def _judged(self, split: Split | Sequence[Query], responses: int, temperature: float) -> list[Group]:
        queries = split_queries(self.job, split) if isinstance(split, str) else split
        groups = self.generate(queries, responses, temperature, "validation")
        if self.actors.prm is not None and temperature:
            self.score(groups)
        self.reward(groups)
        return gather_groups(groups)

    # -- what stays ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the policy into the run directory, as one of evolving at the start of an iteration.

        Every command that takes a run directory then takes this policy.
        """
        self.position.begin_next_iteration()
        save(self.job, self.policy, "evolve", self.position)

    def export(self, directory: str | Path, like: str | Path | None = None, native: bool = False) -> Path:
        """Write the policy that was saved last as a Hugging Face directory; see ``mstar convert megatron-to-hf``."""
        from mstar_mega.checkpoint_tools.convert import megatron_to_hf
        from mstar_mega.checkpoint_tools.native import to_native

        barrier()
        out = Path(directory)
        megatron_to_hf(self.job.dir, out, Path(like) if like else None, export=to_native if native else None)
        return out
