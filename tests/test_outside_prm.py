"""A PRM from outside: another run's gives that run's scores; one of another family scores the same text and image as a
plain reference that re-tokenises by hand and runs every response alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import tiny_families
import tokenizers
import torch
from outside_prm import STARTS, STOPS, TEXTS, ByHand, check, cut_into_words, queries, step_scores, written
from parallel import run_parallel
from safetensors.torch import save_file
from scripted import make_job, make_task

from mstar_mega import settings
from mstar_mega.checkpoint_tools.convert import HEAD_KEY, hf_to_megatron
from mstar_mega.checkpoint_tools.maps import map_of
from mstar_mega.checkpoint_tools.memory import Layout, rank_memory
from mstar_mega.checkpoint_tools.plan import choices, model_of, prm_of
from mstar_mega.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, PRMConfig, RunConfig
from mstar_mega.generation.engine import Sample
from mstar_mega.models.build import build_model
from mstar_mega.models.description import family_from_hf
from mstar_mega.models.families.internvl2 import InternVL2
from mstar_mega.models.lmm import LMM
from mstar_mega.platform import distributed
from mstar_mega.recipe.benchmark import load_policy
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.fit import Position, save
from mstar_mega.recipe.outside_prm import find_outside_prm
from mstar_mega.recipe.prm import build_prm, load_prm
from mstar_mega.recipe.rollouts import Actors, score_responses, to_response
from mstar_mega.rewards.process import score_groups
from mstar_mega.rewards.reader import PRM, Reader
from mstar_mega.settings.rules import validate
from mstar_mega.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("job_of_one")

NO_POLICY = cast(LMM, None)
"""Nothing is made from it."""
WORDS = ("good_token", "bad_token", "step_mark")
CONTROL = {"phi3_5_vision": "<|end|>", "minicpm_v2_5": "<|eot_id|>"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, job_of_one: None) -> dict[str, Path]:
    """A checkpoint of each family with a vocabulary head, and one of a family with a score head."""
    folder, made = tmp_path_factory.mktemp("converted"), {}
    for name in tiny_families.NAMES:
        made[name] = folder / name
        hf_to_megatron(tiny_families.make_model_directory(name, folder / f"hf_{name}"), made[name])
    hf = tiny_families.make_model_directory("minicpm_v2_5", folder / "hf_scores")
    config = json.loads((hf / "config.json").read_text()) | {HEAD_KEY: "linear"}
    (hf / "config.json").write_text(json.dumps(config))
    sources = [source for mapping in map_of(config, "linear", hf).mappings for source in mapping.sources]
    generator = torch.Generator().manual_seed(1)
    weights = {source.name: 0.1 * torch.randn(source.shape, generator=generator) for source in sources}
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    made["scores"] = folder / "scores"
    hf_to_megatron(hf, made["scores"])
    return made


@contextmanager
def a_job(folder: Path, family: InternVL2 | None = None, **prm: Any) -> Iterator[Job]:
    with make_job(folder, Config(prm=PRMConfig(**prm)), make_task(), family) as job:
        yield job


# ------------------------------------------------------------------------------------------------------ another run's


def make_run(folder: Path, refreshed: int = 0, finished: bool = True, seed: int = 0) -> Job:
    """A run directory that has a PRM of random weights, refreshed after that iteration."""
    config = Config(seed=seed, run=RunConfig(dir=str(folder)), prm=PRMConfig(head="likelihood"))
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(settings.dump(config))
    with make_job(folder, config, make_task()) as job:
        prm = build_prm(job, build_model(config, job.family))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in prm.score_parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        trainer = Trainer(prm, OptimizerConfig(), job.prompt, 3)
        save(job, trainer, "prm", Position(iteration=refreshed, step=3, finished=finished))
        return job


def test_another_runs_prm_gives_that_runs_scores(tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")
    policy = build_model(other.config, other.family)
    own = load_prm(other, policy)
    assert own is not None
    own = PRM(own.model, Reader(other.family.prompt))  # not the scripted job's prompt
    with a_job(tmp_path / "job", checkpoint=str(tmp_path / "other")) as job:
        groups, again = (written(job, tmp_path) for _ in range(2))
        score_groups(own, groups, "min", 1000)
        prm = load_prm(job, policy)
        assert prm is not None and not any(p.requires_grad for p in prm.model.parameters())
        score_responses(job, prm, again)
        assert step_scores(again) == step_scores(groups)
        assert len({step.score for group in groups for response in group.responses for step in response.steps}) > 3
        first, second = Actors(job, policy, own).fingerprint(), Actors(job, policy, prm).fingerprint()
        assert second == f"{first} read as internvl2"
    # The refreshed one is that run's PRM from then on; one that is not finished is none.
    make_run(tmp_path / "other", refreshed=2, seed=1)
    make_run(tmp_path / "other", refreshed=4, finished=False)
    found = find_outside_prm(Config(prm=PRMConfig(checkpoint=str(tmp_path / "other"))))
    assert found.checkpoint == tmp_path / "other/checkpoints/prm_0002/iteration_0002_step_000003"


# ---------------------------------------------------------------------------------------------------- another family's


@pytest.mark.parametrize("name", ["phi3_5_vision", "minicpm_v2_5"])
def test_another_familys_words_at_the_ends_of_steps(name: str, converted: dict[str, Path], tmp_path: Path) -> None:
    cut_into_words()
    with a_job(tmp_path, checkpoint=str(converted[name]), good_token="+", bad_token="-") as job:
        prm = load_prm(job, NO_POLICY)
        assert prm is not None
        groups = written(job, tmp_path)
        score_responses(job, prm, groups)
        hand = ByHand(prm, converted[name])
        good, bad = hand.word("+"), hand.word("-")
        wanted = []
        for group in groups:
            rows = []
            for text, starts in zip(TEXTS[:3], [*STARTS, [0]], strict=True):
                text = text.removesuffix("<cut>")
                ids = hand.encode(text)
                ends = [hand.within(ids, text[:start]) for start in starts[1:]] + [len(ids)]
                rows.append(hand.by_words(group.query, ids, ends, good, bad))
            wanted.append(rows)
        check(groups, wanted)
        assert Actors(job, prm.model, prm).fingerprint().endswith(f"read as {name} '+' '-' None")


@pytest.mark.parametrize("name", ["phi3_5_vision", "minicpm_v2_5"])
@pytest.mark.parametrize("kind", ["text", "control"])
def test_another_familys_words_behind_marks(kind: str, name: str, converted: dict[str, Path], tmp_path: Path) -> None:
    mark = CONTROL[name] if kind == "control" else " \u043a\u0438"
    words: dict[str, Any] = {"good_token": "+", "bad_token": "-", "step_mark": mark}
    with a_job(tmp_path, checkpoint=str(converted[name]), **words) as job:
        prm = load_prm(job, NO_POLICY)
        assert prm is not None
        groups = written(job, tmp_path)
        score_responses(job, prm, groups)
        hand = ByHand(prm, converted[name])
        good, bad = hand.word("+"), hand.word("-")
        special: Any = tokenizers.Tokenizer.from_file(str(converted[name] / "model/tokenizer.json")).token_to_id(mark)
        wanted = []
        for group in groups:
            rows = []
            for text, stops in zip(TEXTS[:3], [*STOPS, [13]], strict=True):
                parts = [text[a:b] for a, b in zip([0, *stops], stops, strict=False)]
                ids: list[int] = []
                if kind == "control":
                    ends = [len(ids := [*ids, *hand.encode(part), special]) for part in parts]
                else:
                    ids = hand.encode("".join(part + mark for part in parts))
                    spelt = ["".join(part + mark for part in parts[: k + 1]) for k in range(len(parts))]
                    ends = [hand.covering(ids, each) for each in spelt]
                rows.append(hand.by_words(group.query, ids, ends, good, bad))
            wanted.append(rows)
        check(groups, wanted)


def scores_in_a_layout(folder: str, checkpoint: str, tensor: int, pipeline: int) -> list[list[list[float | None]]]:
    """What every rank of one model copy that is cut so gets."""
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    distributed.initialize(parallel, 0)
    prm = PRMConfig(checkpoint=checkpoint, good_token="+", bad_token="-", step_mark="<|eot_id|>")
    with make_job(Path(folder), Config(parallel=parallel, prm=prm), make_task()) as job:
        groups, found = written(job, Path(folder)), load_prm(job, NO_POLICY)
        assert found is not None
        score_responses(job, found, groups)
        return step_scores(groups)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_words_in_every_layout(tensor: int, pipeline: int, converted: dict[str, Path], tmp_path: Path) -> None:
    arguments = (str(tmp_path), str(converted["minicpm_v2_5"]))
    queries(tmp_path)
    (whole,) = run_parallel(1, "test_outside_prm:scores_in_a_layout", *arguments, 1, 1)
    for found in run_parallel(2, "test_outside_prm:scores_in_a_layout", *arguments, tensor, pipeline):
        for group, wanted in zip(found, whole, strict=True):
            for scores, expected in zip(group, wanted, strict=True):
                assert scores == pytest.approx(expected, abs=1e-5)


def test_another_familys_score_head(converted: dict[str, Path], tmp_path: Path) -> None:
    """As such a head is taught: the last step ends with the stop token, unless the response was cut."""
    with a_job(tmp_path, checkpoint=str(converted["scores"])) as job:
        prm = load_prm(job, NO_POLICY)
        assert prm is not None and prm.model.head == "linear"
        groups = written(job, tmp_path)
        score_responses(job, prm, groups)
        hand = ByHand(prm, converted["scores"])
        stop = family_from_hf(converted["scores"] / "model").response_tokens("")
        weights = prm.model.score_head
        wanted = []
        for group in groups:
            rows = []
            for text, starts in zip(TEXTS[:3], [*STARTS, [0]], strict=True):
                ids = hand.encode(text.removesuffix("<cut>"))
                ends = [hand.within(ids, text[:start]) for start in starts[1:]]
                ids += [] if text.endswith("<cut>") else stop
                rows_ = hand.hidden(group.query, ids)[[end - 1 for end in (*ends, len(ids))]]
                rows.append(torch.sigmoid(rows_ @ (weights[0] - weights[1])).tolist())
            wanted.append(rows)
        check(groups, wanted)


def test_with_the_policys_tokenizer_sampled_tokens_are_kept(converted: dict[str, Path], tmp_path: Path) -> None:
    """Also those that no encoder would write; words are not asked behind the stop token."""
    words = {"good_token": "1", "bad_token": "2"}
    family = family_from_hf(converted["internvl2"] / "model")
    assert isinstance(family, InternVL2)
    with a_job(tmp_path, family, checkpoint=str(converted["internvl2"]), **words) as job:
        prm = load_prm(job, NO_POLICY)
        assert prm is not None
        encode = family.tokenizer.encode
        spelt = [id for letter in "sum is\n\n# Answer\n\n7" for id in encode(letter)]
        assert spelt != encode("sum is\n\n# Answer\n\n7")
        for is_cut in (False, True):
            tokens = spelt if is_cut else [*spelt, *family.response_tokens("")]
            sampled = to_response(job, 0, Sample(tokens, [0.0] * len(tokens), is_cut))
            reading = prm.reader.read(sampled)
            assert reading.tokens == spelt and reading.ends == [step.end for step in sampled.steps[:-1]] + [len(spelt)]
    assert not family.tokenizer.spells_as(family_from_hf(converted["phi3_5_vision"] / "model").tokenizer)


def test_a_response_too_long_for_the_prm_has_the_worst_score_and_is_told(
    converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(Job, "warn", lambda job, text: warned.append(text))
    with a_job(tmp_path, checkpoint=str(converted["minicpm_v2_5"]), good_token="+", bad_token="-") as job:
        prm = load_prm(job, NO_POLICY)
        assert prm is not None and prm.model.size.context == 512
        groups = written(job, tmp_path, [TEXTS[0], "3 4 5 " * 120 + "\n\n# Answer\n\n7"])
        score_responses(job, prm, groups)
    assert all(group.responses[1].score == 0.0 < (group.responses[0].score or 0) for group in groups)
    assert warned == [
        "2 responses from query q0 on are too long for the PRM, whose context is 512 tokens: they have the worst "
        "process score, 0"
    ]


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("minicpm_v2_5", (None, None, None), "has no score head: say by which tokens"),
        ("minicpm_v2_5", ("+", "qzjxw", None), "prm.bad_token 'qzjxw' is 5 tokens of"),
        ("minicpm_v2_5", ("+", "+", None), "are one token"),
        ("scores", ("+", "-", None), "has a score head, which gives the scores"),
        ("nowhere", ("+", "-", None), "is neither a run directory"),
        ("unfinished", (None, None, None), "is a run without a finished PRM"),
        ("borrowing", (None, None, None), "is a run that took its PRM from elsewhere: give that, nowhere"),
    ],
)
def test_what_cannot_be_read_is_said(
    name: str, words: tuple[Any, ...], told: str, converted: dict[str, Path], tmp_path: Path
) -> None:
    if name == "unfinished":
        make_run(tmp_path / name, finished=False)
    if name == "borrowing":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(settings.dump(Config(prm=PRMConfig(checkpoint="nowhere"))))
    checkpoint = str(converted.get(name, tmp_path / name))
    with pytest.raises(ValueError, match=told) as raised:
        find_outside_prm(Config(prm=PRMConfig(checkpoint=checkpoint, **dict(zip(WORDS, words, strict=True)))))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("prm", "told"),
    [
        ({"good_token": "+"}, "prm.good_token is given without prm.checkpoint"),
        ({"checkpoint": "x", "step_mark": "\n"}, "prm.step_mark is given alone"),
        ({"checkpoint": "x", "bad_token": "-"}, "prm.bad_token is given alone"),
        ({"checkpoint": "x", "refresh_every": 2}, "prm.refresh_every is 2 and prm.checkpoint is given"),
        ({"checkpoint": "x", "good_token": "", "bad_token": "-"}, "prm.good_token is '': it must be a text"),
    ],
)
def test_settings_that_do_not_go_together(prm: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        validate(Config(prm=PRMConfig(**prm)))


# ------------------------------------------------------------------------------------------------------------ elsewhere


def test_a_plan_counts_the_second_model(converted: dict[str, Path], tmp_path: Path) -> None:
    model = ModelConfig(family="internvl2", checkpoint=str(converted["internvl2"]))
    asked: list[tuple[str, dict[str, Any]]] = [
        ("minicpm_v2_5", {"good_token": "+", "bad_token": "-"}),
        ("scores", {}),
    ]
    for name, words in asked:
        config = Config(model=model, prm=PRMConfig(checkpoint=str(converted[name]), **words))
        (stage,) = rank_memory(model_of(config)[0], config, Layout(1, 1, 128), prm_of(config))
        with make_job(tmp_path, config, make_task()) as job:
            prm = load_prm(job, NO_POLICY)
        assert prm is not None and stage.prm == sum(p.nbytes for p in prm.model.parameters())
        assert stage.prm_training == 0
        (choice,) = choices(model_of(config)[0], config, 1, 128)
        assert choice.stages[0].prm == stage.prm
    with pytest.raises(ValueError, match="it is not there"):
        prm_of(replace(config, prm=PRMConfig(checkpoint=str(tmp_path / "nowhere"))))


def test_a_benchmark_is_scored_by_it_too(converted: dict[str, Path], tmp_path: Path) -> None:
    model = ModelConfig(family="internvl2", checkpoint=str(converted["internvl2"]))
    config = Config(model=model, prm=PRMConfig(checkpoint=str(converted["scores"])))
    family = family_from_hf(converted["internvl2"] / "model")
    assert isinstance(family, InternVL2)
    with make_job(tmp_path, config, make_task(), family) as job:
        _, prm = load_policy(job, converted["internvl2"])
    assert prm is not None and prm.reader.name == "minicpm_v2_5"


def test_sizes_that_the_layout_cannot_cut_are_said_to_be_the_prms(converted: dict[str, Path]) -> None:
    prm = PRMConfig(checkpoint=str(converted["scores"]))
    with pytest.raises(ValueError, match=r"parallel.tensor 5 does not divide .*minicpm_v2_5, prm.checkpoint"):
        find_outside_prm(Config(parallel=ParallelConfig(tensor=5), prm=prm))
    assert distributed.layout().tensor_size == 1
