"""A file as a user would write it: a function for every setting that takes one, and some that break its contract."""

from __future__ import annotations

MINE = '''
from mstar_mega.data.digits import task as digits


def closeness(query, response):
    """Graded: 1 for the gold answer, one half for a number that is one off."""
    try:
        distance = abs(int(response.answer) - int(query.answer))
    except (TypeError, ValueError):
        return float(response.answer == query.answer)
    return {0: 1.0, 1: 0.5}.get(distance, 0.0)


def shortest(group, settings, seed):
    right = [response for response in group.responses if response.correct]
    return sorted(right, key=lambda response: len(response.tokens))[: settings.k]


shortest.needs_scores = False


def everything(group, settings, seed):
    return group.responses


def first_two(group, settings, seed):
    return group.responses[:2]


def half_away(query, response):
    return 1.0 if response.correct else -0.25


half_away.needs_scores = False


def second_worst(scores):
    return sorted(scores)[min(1, len(scores) - 1)]


def variety(group, settings):
    return len({response.answer for response in group.responses}) / len(group.responses)


variety.needs_scores = False


def shout(question, choices, hint, instruct):
    return question.upper() + "".join(f" [{letter}] {text}" for letter, text in choices.items())


def read(config, directory, seed):
    return digits.build(config, directory, seed)


def none(query, response):
    return None


def too_much(query, response):
    return 1.5


def breaks(query, response):
    raise KeyError("unit")


def one(query):
    return 1.0


number = 3
'''
