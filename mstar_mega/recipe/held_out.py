"""Which annotated queries are kept out of the PRM's training, to measure it on."""

from __future__ import annotations

from collections.abc import Sequence

from mstar_mega.data.types import Group, Query
from mstar_mega.kernels.noise import key_of
from mstar_mega.recipe.context import Job
from mstar_mega.recipe.rollouts import gather_groups


def divide(
    job: Job, groups: Sequence[Group], earlier: Sequence[Sequence[Query]] = ()
) -> tuple[list[Group], list[Group]]:
    """(training, held-out) annotated groups of all ranks; a stable choice. Collective.

    Queries that share an image stand on one side, so the held-out ones can be a few more or fewer than their share.
    ``earlier``: what the PRM was trained on and measured on before, annotation by annotation. A query or image keeps
    its side, so that nothing is measured on what an earlier training has seen.
    """
    share, seed = job.config.annotate.held_out, job.config.seed
    known: dict[str, bool] = {}
    for queries in earlier:
        _divide(sorted(queries, key=lambda query: _order(seed, query)), share, known)
    everyone = sorted(gather_groups(groups), key=lambda group: _order(seed, group.query))
    sides = _divide([group.query for group in everyone], share, known)
    train, held_out = ([everyone[i] for i, is_out in sides if is_out == wanted] for wanted in (False, True))
    return train, held_out


def _order(seed: int, query: Query) -> int:
    return key_of(seed, "held-out", query.id)


def _divide(queries: Sequence[Query], share: float, known: dict[str, bool]) -> list[tuple[int, bool]]:
    """(position, whether it is held out) of each query. ``known`` has that of queries and images, and learns it."""
    wanted = round(len(queries) * share)
    together = [(of_image, _side(queries, of_image, known)) for of_image in _by_image(queries)]
    held_out = sum(len(of_image) for of_image, side in together if side)
    sides: list[tuple[int, bool]] = []
    for of_image, side in together:
        # A picture with many questions must not take the whole of a small set.
        fits = held_out < wanted and 2 * (held_out + len(of_image)) <= max(2, len(queries))
        is_out = fits if side is None else side
        held_out += len(of_image) if side is None and is_out else 0
        sides += [(i, is_out) for i in of_image]
        known.update({name: is_out for i in of_image for name in _names(queries[i])})
    return sides


def _side(queries: Sequence[Query], positions: Sequence[int], known: dict[str, bool]) -> bool | None:
    """Where these queries stood before: what was trained on once is never held out. None: they are new."""
    before = [known[name] for i in positions for name in _names(queries[i]) if name in known]
    return all(before) if before else None


def _names(query: Query) -> list[str]:
    return [f"query {query.id}", *(f"image {image.digest}" for image in query.images)]


def _by_image(queries: Sequence[Query]) -> list[list[int]]:
    """Positions of queries that share an image, directly or through others, together; in the order of their first."""
    component: dict[str, int] = {}
    members: dict[int, list[int]] = {}
    for i, query in enumerate(queries):
        digests = [image.digest for image in query.images]
        joined = sorted({component[digest] for digest in digests if digest in component} | {i})
        members[joined[0]] = [*(member for one in joined for member in members.pop(one, [])), i]
        held = (image.digest for member in members[joined[0]] for image in queries[member].images)
        component.update(dict.fromkeys(held, joined[0]))
    return sorted(map(sorted, members.values()))
