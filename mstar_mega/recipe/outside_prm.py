"""A PRM that this run does not train: another run's, or a converted checkpoint, of whatever family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mstar_mega.config import Config
from mstar_mega.data.pictures import PictureReading
from mstar_mega.data.prefetch import Ahead
from mstar_mega.data.tokenizer import Tokenizer
from mstar_mega.models.build import build_family, build_model, check_divisible
from mstar_mega.models.description import MODEL_FILES, family_from_hf
from mstar_mega.models.families.base import Family
from mstar_mega.models.mapping import Head, head_of
from mstar_mega.models.packing import prompt_bytes
from mstar_mega.platform.inputs import refuse_links_out
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.fit import finished_prm
from mstar_mega.rewards.reader import PRM, Judgement, Mark, Reader
from mstar_mega.settings import CONFIG_FILE, load
from mstar_mega.training.checkpoint import load_checkpoint
from mstar_mega.training.manifest import read_index


@dataclass(frozen=True)
class Outside:
    """What ``prm.checkpoint`` leads to."""

    checkpoint: Path
    """The checkpoint itself."""
    family: Family
    head: Head
    judgement: Judgement | None
    """By ``prm.good_token``, ``prm.bad_token`` and ``prm.step_mark``; None where there is a score head."""


def find_outside_prm(config: Config) -> Outside:
    """The PRM that ``prm.checkpoint`` names, weights not read. Rank by rank: reads files only.

    Raises ValueError where there is none, where it needs tokens that the settings do not give, or has no use for those
    that they give.
    """
    path = Path(str(config.prm.checkpoint))
    if path.is_dir():
        refuse_links_out(path, "what it leads to would be read")
    if (path / MODEL_FILES).is_dir():
        checkpoint, family, head = path, family_from_hf(path / MODEL_FILES), head_of(read_index(path).tensors)
    elif (path / CONFIG_FILE).is_file():
        checkpoint, family, head = _of_run(path)
    else:
        raise ValueError(
            f"prm.checkpoint {path} is neither a run directory (it has no {CONFIG_FILE}) nor a checkpoint that `mstar "
            f"convert hf-to-megatron` made (it has no folder {MODEL_FILES})"
        )
    family.pictures = PictureReading.of(config.data)
    check_divisible(_with_sizes_of(config, family), family.vision, family.language)
    return Outside(checkpoint, family, head, _judgement(config, family.tokenizer, head))


def load_outside_prm(job: Job) -> PRM:
    """The PRM of :func:`find_outside_prm` with its weights, frozen. Collective."""
    found = find_outside_prm(job.config)
    model = build_model(_with_sizes_of(job.config, found.family), found.family, found.head, draw=False)
    model.requires_grad_(False)
    state, _ = load_checkpoint(found.checkpoint, {"model": model.sharded_state_dict()})
    model.load_state_dict(state["model"])
    return PRM(model, reader_of(job, found))


def reader_of(job: Job, found: Outside) -> Reader:
    """How this run's queries and responses are read to that PRM."""
    own, data, judgement = job.family, job.config.data, found.judgement
    prompt = Ahead(found.family.prompt, prompt_bytes, data.workers, data.prefetch_mb << 20)
    as_sampled = found.family.tokenizer.spells_as(own.tokenizer) and (judgement is None or judgement.mark is None)
    return Reader(prompt, None if as_sampled else found.family, judgement, own.stop_tokens, _name(job.config, found))


def _name(config: Config, found: Outside) -> str:
    words = (config.prm.good_token, config.prm.bad_token, config.prm.step_mark) if found.judgement else ()
    return " ".join([found.family.name, *map(repr, words)])


def _with_sizes_of(config: Config, family: Family) -> Config:
    """For messages about sizes, which name the model."""
    size = f"prm.checkpoint {config.prm.checkpoint}"
    return replace(config, model=replace(config.model, family=family.name, size=size))


def _of_run(path: Path) -> tuple[Path, Family, Head]:
    config = load(path)
    if config.prm.checkpoint is not None:
        raise ValueError(
            f"prm.checkpoint {path} is a run that took its PRM from elsewhere: give that, {config.prm.checkpoint}"
        )
    checkpoint = finished_prm(path / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"prm.checkpoint {path} is a run without a finished PRM: `mstar train-prm` makes one")
    return checkpoint, build_family(config), config.prm.head


def _judgement(config: Config, tokenizer: Tokenizer, head: Head) -> Judgement | None:
    """How a model without a score head is asked. Raises ValueError."""
    prm = config.prm
    where = f"prm.checkpoint {prm.checkpoint}"
    if prm.good_token is None or prm.bad_token is None:  # the settings' rules have it that both are given or none
        if head == "vocabulary":
            raise ValueError(
                f"{where} has no score head: say by which tokens it judges a step, prm.good_token and prm.bad_token "
                "(and prm.step_mark, where it does so behind a mark)"
            )
        return None
    if head != "vocabulary":
        raise ValueError(
            f"{where} has a score head, which gives the scores: leave prm.good_token, prm.bad_token and prm.step_mark "
            "away"
        )
    good, bad = _one_token(tokenizer, "good_token", prm.good_token), _one_token(tokenizer, "bad_token", prm.bad_token)
    if good == bad:
        raise ValueError(f"prm.good_token {prm.good_token!r} and prm.bad_token {prm.bad_token!r} are one token, {good}")
    mark = None if prm.step_mark is None else Mark(prm.step_mark, _control(tokenizer, prm.step_mark))
    return Judgement(good, bad, mark)


def _one_token(tokenizer: Tokenizer, name: str, text: str) -> int:
    control = _control(tokenizer, text)
    ids = tokenizer.encode(text) if control is None else [control]
    if len(ids) == 2 and not tokenizer.decode(ids[:1]):  # the space that Llama's put in front of every text
        ids = ids[1:]
    if len(ids) != 1:
        raise ValueError(
            f"prm.{name} {text!r} is {len(ids)} tokens of {tokenizer.path}, {ids}: it must be one; a space in front of "
            "it may make the difference"
        )
    return ids[0]


def _control(tokenizer: Tokenizer, text: str) -> int | None:
    try:
        return tokenizer.id(text)
    except ValueError:
        return None
