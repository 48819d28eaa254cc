"""The ladder's runs on disk: how each is made, resumed and read."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ladder_rows import BY_NAME, Row

from mstar_mega import settings
from mstar_mega.config import Config
from mstar_mega.data.records import read_groups
from mstar_mega.platform.files import write_text_atomic
from mstar_mega.platform.orphans import die_with_parent
from mstar_mega.recipe.intervals import iterations_per_pass
from mstar_mega.recipe.method import needs_prm, resolve_method
from mstar_mega.report.accounting import generated
from mstar_mega.report.run import load_run
from mstar_mega.settings.shipped import config_file
from mstar_mega.settings.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[1]
MADE_BY = "made_by.json"
"""In a run directory: the code that each of its starts was made with."""
CODE = ("mstar_mega", "kernels", "checkpoint_tools", "examples", "setup.py", "constraints.txt", "benchmarks/ladder*.py")
"""What a run depends on; results and pages are not among it."""


def run_child(command: list[str], log: Path) -> None:
    """Run a command to its end, its output at the end of ``log``; it does not outlive this process.

    Raises CalledProcessError.
    """
    with log.open("a") as output:
        subprocess.run(
            command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            preexec_fn=die_with_parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def mixing(config: Config, mixin: float) -> tuple[str, ...]:
    """Settings with which unlabelled prompts that join after the share ``mixin`` add no response in total.

    A run with them has fewer iterations, and in those that they join so many unlabelled queries per labelled one that
    it draws as many responses as one with labelled queries alone (but for rounding to whole queries). ``evolve.passes``
    alone could not: it is met in whole iterations. Of the numbers of iterations the lowest is taken for which there are
    unlabelled queries enough, which leaves the unlabelled ones the most weight. Raises ValueError where none will do.
    """
    labelled, unlabelled = config.data.labelled_queries, config.data.unlabelled_queries
    assert labelled and unlabelled, "the built-in task has numbers"
    per_pass = iterations_per_pass(resolve_method(config.evolve).interval)
    whole = math.ceil(config.evolve.passes * per_pass - 1e-9)
    for iterations in range(1, whole):
        joined = sum(i / iterations >= mixin for i in range(iterations))
        ratio = (whole - iterations) / joined if joined else math.inf
        if ratio <= unlabelled / labelled + 1e-9:
            passes = iterations / per_pass
            return f"--evolve.passes={passes}", f"--prompts.mixin={mixin}", f"--prompts.ratio={ratio}"
    raise ValueError(
        f"{unlabelled} unlabelled queries beside {labelled} are too few to join after {100 * mixin:g}% of "
        f"{whole} iterations without more responses in total; give data.unlabelled_queries more"
    )


def present_code() -> dict[str, Any]:
    """The commit that a run begun now is made by, and whether its code was changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "HEAD")
    return {"commit": commit or "unknown", "changed": bool(git("status", "--porcelain", "--", *CODE))}


@dataclass(frozen=True)
class Outcome:
    """What is kept of a finished run: enough for every table, for good, in a few hundred bytes."""

    settings: str
    """Digest of what the ladder sets for the row: an outcome stands for runs of these settings alone."""
    questions: str
    """Digest of the questions' names, in order."""
    count: int
    right: str
    """Of the last policy, whether each greedy answer is right: ``count`` bits in hexadecimal, the first one highest."""
    costs: dict[str, int]
    made_by: list[dict[str, Any]]

    def answers(self) -> list[bool]:
        """By question, in order."""
        return [bit == "1" for bit in f"{int(self.right, 16):0{self.count}b}"]


def digest(text: str) -> str:
    """Short, and other for other texts."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_answers(run: Path, split: str) -> dict[str, bool]:
    """By question of a split, whether the last policy's greedy answer is right."""
    newest = sorted(run.glob(f"rollouts/evaluation_*_{split}_greedy"))[-1]
    groups = [group for block in sorted(newest.glob("block_*.jsonl")) for group in read_groups(block)]
    return {group.query.id: bool(group.responses[0].correct) for group in groups}


def read_costs(run: Path, is_warmup: bool) -> dict[str, int]:
    """Training responses, generated tokens of all but measurements, and optimizer steps behind the warm-up's.

    ``evaluation_tokens``: those that the measurements generated, the warm-up policy's included.
    """
    phases = generated(load_run(run))
    costs = {"responses": 0, "tokens": 0, "evaluation_tokens": phases["evaluate"]["tokens"], "steps": 0}
    if is_warmup:
        return costs
    summary = json.loads((run / "summary.json").read_text())
    steps = [point["steps"] for point in summary["trajectory"]]
    # The base run has step labels for every row; only those that need a PRM pay for them.
    paid = ("evolve", "sweeps", "annotate") if needs_prm(settings.load(run)) else ("evolve", "sweeps")
    return {
        **costs,
        "responses": summary["responses_generated"] or 0,
        "tokens": sum(phases[phase]["tokens"] for phase in paid),
        "steps": steps[-1] - steps[0],
    }


@dataclass(frozen=True)
class Ladder:
    """Where the runs lie and how they are made."""

    directory: Path
    config: str
    outcomes: Path
    """File with what came of every finished run: a ladder goes on from it where the runs themselves are gone."""
    common: tuple[str, ...] = ()
    """Settings of every run, the base's included."""

    def run(self, name: str, seed: int) -> Path:
        """A row's run directory; the warm-up's is the base run's."""
        return self.directory / f"{'base' if name == 'warmup' else name}_{seed}"

    def log(self, name: str, seed: int) -> Path:
        return self.directory / f"{self.run(name, seed).name}.log"

    def arguments(self, name: str, seed: int, more: tuple[str, ...]) -> list[str]:
        return [f"--config={self.config}", f"--run.dir={self.run(name, seed)}", f"--seed={seed}", *self.common, *more]

    def settings_of(self, row: Row, seed: int) -> tuple[str, ...]:
        """What the row's run of a seed sets. Raises ValueError where it needs finished runs that are not there."""
        if row.mixin is not None:
            base = settings.parse(self.arguments(row.name, seed, row.settings))
            return *row.settings, *mixing(base, row.mixin)
        if row.tokens_of is not None:
            for name in row.tokens_of:
                if not self.is_finished(BY_NAME[name], seed):
                    raise ValueError(f"{row.name} needs the finished run {self.run(name, seed).name} first")
            most, own = (self.outcome(BY_NAME[name], seed).costs["tokens"] for name in row.tokens_of)
            evolve = settings.parse(self.arguments(row.name, seed, row.settings)).evolve
            per_pass = iterations_per_pass(resolve_method(evolve).interval)
            passes = round(evolve.passes * most / own * per_pass) / per_pass
            return *row.settings, f"--evolve.passes={passes}"
        return row.settings

    def launch(self, command: str, name: str, seed: int, more: tuple[str, ...]) -> None:
        """One `mstar` command in one process with one thread; its output is in the log. Raises CalledProcessError."""
        path = self.run(name, seed) / MADE_BY
        path.parent.mkdir(parents=True, exist_ok=True)
        start = {**present_code(), "date": datetime.date.today().isoformat()}
        made_by = json.loads(path.read_text()) if path.exists() else []
        if made_by[-1:] != [start]:
            write_text_atomic(path, json.dumps([*made_by, start], indent=1) + "\n")
        arguments = self.arguments(name, seed, more)
        run_child([sys.executable, "-m", "mstar_mega.cli", command, *arguments], self.log(name, seed))

    def make_base(self, seed: int) -> None:
        """Warm-up policy, step labels and PRM of a seed. Raises ValueError where it has them by other settings."""
        done = self.run("base", seed) / "done"
        if done.exists():
            changed = settings.differences(settings.load(done.parent), settings.parse(self.arguments("base", seed, ())))
            if changed:
                raise ValueError(f"{done.parent} was made with other settings ({changed[0]}): take another --dir")
            return
        self.launch("train-prm", "base", seed, ())
        done.touch()

    def make(self, row: Row, seed: int) -> None:
        """One row's run of a seed, from its base; one that was interrupted goes on."""
        directory, base = self.run(row.name, seed), self.run("base", seed)
        if row.name == "warmup":
            return
        if not self.is_finished(row, seed):
            more = self.settings_of(row, seed)
            if not directory.exists():
                part = directory.with_name(f".{directory.name}.part")  # an interrupted copy is not taken for a run
                shutil.rmtree(part, ignore_errors=True)
                others = shutil.ignore_patterns("data", "done", ".lock", "tensorboard", MADE_BY)
                shutil.copytree(base, part, ignore=others)
                part.rename(directory)
            data = f"--data.dir={base / 'data'}"
            self.launch("evolve", row.name, seed, ("--run.allow_changed_settings=true", data, *more))
        # Gigabytes over a whole ladder; what is reported is elsewhere.
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)

    def is_finished(self, row: Row, seed: int) -> bool:
        """Whether there is the run, or its outcome by the present settings in ``outcomes``."""
        return self._is_there(row, seed) or self._kept(row, seed) is not None

    def _is_there(self, row: Row, seed: int) -> bool:
        return (self.run(row.name, seed) / ("done" if row.name == "warmup" else "summary.json")).exists()

    def _kept(self, row: Row, seed: int) -> Outcome | None:
        kept = _read_outcomes(self.outcomes).get(self.run(row.name, seed).name)
        return kept if kept is not None and kept.settings == self.digest_of_settings(row) else None

    def digest_of_settings(self, row: Row) -> str:
        """Digest of what the ladder sets for a row: its config, whatever the comments, and the row's own.

        A later version's defaults are not among it: the commits of a run tell those.
        """
        content = _read_config(self.config)
        return digest(json.dumps([content, self.common, row.settings, row.mixin, row.tokens_of], sort_keys=True))

    def finished_seeds(self, row: Row) -> list[int]:
        """Every seed of which the row is finished, whichever start made it."""
        prefix = self.run(row.name, 0).name[:-1]
        names = {path.name for path in self.directory.glob(f"{prefix}*") if path.is_dir()}
        names |= {name for name in _read_outcomes(self.outcomes) if name.startswith(prefix)}
        seeds = [name.removeprefix(prefix) for name in names]
        return sorted(seed for seed in map(int, filter(str.isdecimal, seeds)) if self.is_finished(row, seed))

    def starts(self, row: Row, seed: int) -> list[dict[str, Any]]:
        """The code that made the row's run, its base's included."""
        paths = {self.run(name, seed) / MADE_BY: None for name in ("base", row.name)}
        return [start for path in paths if path.exists() for start in json.loads(path.read_text())]

    def outcome(self, row: Row, seed: int) -> Outcome:
        """What came of a finished run; it is kept in ``outcomes``, and there even where the run is gone."""
        name = self.run(row.name, seed).name
        if not self._is_there(row, seed):
            kept = self._kept(row, seed)
            assert kept is not None, "finished"
            return kept
        found = _read_outcome(self.run(row.name, seed), row.name == "warmup", self.digest_of_settings(row))
        found = replace(found, made_by=self.starts(row, seed))
        kept_all = _read_outcomes(self.outcomes)
        if kept_all.get(name) != found:
            lines = {key: json.dumps(asdict(value)) for key, value in sorted({**kept_all, name: found}.items())}
            body = ",\n".join(f"{json.dumps(key)}: {line}" for key, line in lines.items())
            write_text_atomic(self.outcomes, f"{{\n{body}\n}}\n")
            _read_outcomes.cache_clear()
        return found


@cache
def _read_outcome(run: Path, is_warmup: bool, settings_digest: str) -> Outcome:
    answers = read_answers(run, "test")
    bits = "".join("01"[right] for right in answers.values())
    questions = digest("\n".join(answers))
    return Outcome(settings_digest, questions, len(bits), f"{int(bits, 2):x}", read_costs(run, is_warmup), [])


@cache
def _read_config(name: str) -> dict[str, Any]:
    content = read_yaml(config_file(name))
    return {group: values for group, values in content.items() if group != "run"}


@cache
def _read_outcomes(path: Path) -> dict[str, Outcome]:
    return {name: Outcome(**kept) for name, kept in json.loads(path.read_text()).items()} if path.exists() else {}
