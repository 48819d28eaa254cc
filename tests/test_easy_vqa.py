"""easy-VQA: the published questions, cut by picture, with reasoning that leads to the published answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from mstar_mega.config import DataConfig
from mstar_mega.data import easy_vqa
from mstar_mega.data.easy_vqa import COLOURS, SHAPES, Asked, chain_of_thought
from mstar_mega.data.types import Task
from mstar_mega.rewards.answers import extract_answer

pytest.importorskip("easy_vqa", reason="the package easy-vqa is not installed")


@pytest.fixture(scope="module")
def task() -> Task:
    config = DataConfig(
        "easy_vqa", warmup_examples=3000, labelled_queries=None, unlabelled_queries=500, test_queries=9673
    )
    return easy_vqa.build(config, Path("unused"), 0)


def test_all_published_questions_are_there(task: Task) -> None:
    assert len(task.test) == 9673 and len({query.images for query in task.test}) == 1000
    assert len(task.validation) == 250 and len(task.unlabelled) == 500
    assert 38_575 - 250 - 500 - 40 < len(task.labelled) <= 38_575 - 750
    assert {query.answer for query in task.test} == {*SHAPES, *COLOURS, "yes", "no"}


def test_no_picture_is_in_two_sets(task: Task) -> None:
    sets = (task.labelled, task.unlabelled, task.validation, task.test)
    digests = [{query.images[0].path for query in queries} for queries in sets]
    assert sum(map(len, digests)) == len(set.union(*digests))
    labelled = {query.id for query in task.labelled}
    assert all(query.id in labelled for query, _ in task.warmup)


def test_the_reasoning_leads_to_the_published_answer(task: Task) -> None:
    for query, chain in task.warmup:
        assert extract_answer(chain) == query.answer
        if query.kind == "yes or no":  # derived here a second time, from the reasoning alone
            _, compared, *asked_if_not = chain.split("\n\n")[:-2]
            assert (query.answer == "yes") == ((" not " in compared) == bool(asked_if_not)), (query.question, chain)
        else:
            assert query.answer in chain.split("\n\n")[0].split()


def test_one_chain_in_full() -> None:
    asked = Asked(0, "does the image not contain a red shape?", "yes", 3)
    assert (
        chain_of_thought(asked, "blue", "circle")
        == "a blue circle\n\nblue is not red\n\nasked if not\n\n# Answer\n\nyes"
    )


def test_sizes_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="the published test split has 9673"):
        easy_vqa.build(DataConfig("easy_vqa", test_queries=10_000), Path("unused"), 0)
    with pytest.raises(ValueError, match="data.validation_queries is 99999: the training split has only 38575"):
        easy_vqa.build(DataConfig("easy_vqa", validation_queries=99_999), Path("unused"), 0)
