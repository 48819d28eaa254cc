"""Responses per second and core of the answer reward and of the benchmarks' extraction, against generating them.

    .venv/bin/python benchmarks/rewards.py

Rates are by processor time, the algebra worker's included, so that other work on the machine does not change them.
Every answer differs from the others: nothing comes from the checker's memory. The stream as in training is the
exception: 16 responses to each query, one after another, whose answers are six different ones on average, half of them
the most frequent one. Generation is the small policy of the built-in task, the cheapest there is; a response of a
larger policy takes far longer to draw and no longer to judge.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

from environment import environment, write_result
from stages import build_queries, generate_stage

from mstar_mega.config import Config
from mstar_mega.models.build import build_family, build_model
from mstar_mega.platform import distributed
from mstar_mega.rewards.answers import extract_answer
from mstar_mega.rewards.checker import AnswerChecker
from mstar_mega.rewards.extraction import find_answer

Case = tuple[str, str, tuple[str, ...]]
"""Response, gold answer, choices."""

REASONING = (
    "The chart has four bars, and the question asks for the difference between two of them.\n\n"
    "The tallest bar reaches {a} and the shortest one reaches {b}, as the labels on the left show.\n\n"
    "I take the smaller from the larger number: {a} - {b} = {c}.\n\n"
)
CHOICES = ("the red bar", "the blue bar", "12 cm", "3/4")


def numbers(rng: random.Random) -> Case:
    """A written-out response with a number, a fraction, a unit, a percent sign or a thousands comma."""
    value = rng.randrange(1, 100_000)
    written = rng.choice(
        (f"{value}", f"{value:,}", f"{value} cm", f"{value}.0", f"\\boxed{{{value}}}", f"{2 * value}/2")
    )
    gold = str(value + rng.choice((0, 0, 1)))
    return REASONING.format(a=value + 7, b=7, c=value) + f"# Answer\n\n{written}", gold, ()


def choices(rng: random.Random) -> Case:
    """A response that ends in a letter or in a choice's text."""
    written = rng.choice(("B", "(B)", "B. the blue bar", "the blue bar", "3/4", "0.75", "the green bar"))
    number = rng.randrange(10_000)
    return REASONING.format(a=number, b=1, c=number - 1) + f"# Answer\n\n{written}", "B", CHOICES


def algebra(rng: random.Random) -> Case:
    """A response whose answer is an expression, which goes to math-verify."""
    a, b = rng.randrange(2, 5000), rng.randrange(2, 5000)
    written, gold = rng.choice(
        ((f"{a}(x+{b})", f"{a}x+{a * b}"), (f"\\sqrt{{{a * a * b}}}", f"{a}\\sqrt{{{b}}}"), (f"x^2+{a}", f"x^2-{b}"))
    )
    return REASONING.format(a=a, b=b, c=a - b) + f"# Answer\n\n{written}", gold, ()


SAMPLES = 16
"""Responses to a query, as ``evolve.responses`` says by default."""


def stream(rng: random.Random, count: int) -> list[Case]:
    """Algebra as training meets it: the answers to a query repeat one another."""
    cases: list[Case] = []
    while len(cases) < count:
        response, gold, _ = algebra(rng)
        reasoning, marker, first = response.partition("# Answer\n\n")
        # An assumption: half of them agree, the others differ from that by one of eight terms.
        answers = [first] * (SAMPLES // 2) + [f"{first}+{rng.randrange(1, 9)}y" for _ in range(SAMPLES // 2)]
        rng.shuffle(answers)
        cases += [(f"{reasoning}{marker}{answer}", gold, ()) for answer in answers]
    return cases[:count]


def judge(cases: list[Case]) -> Callable[[], None]:
    """What training does with each response."""

    def run() -> None:
        with AnswerChecker() as checker:
            for response, gold, options in cases:
                checker.check(extract_answer(response), gold, options)

    return run


def read_prose(cases: list[Case]) -> Callable[[], None]:
    """What evaluation does with a response that has no answer block."""

    def run() -> None:
        for response, _, options in cases:
            prose = response.replace("# Answer\n\n", "Therefore, the answer is ")
            find_answer(prose, "letter" if options else "float", dict(zip("ABCD", options, strict=False)))

    return run


def processor_seconds(run: Callable[[], object]) -> float:
    """Of this process and of children that have ended."""

    def spent() -> float:
        return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

    started = spent()
    run()
    return spent() - started


def one_by_one(make: Callable[[random.Random], Case]) -> Callable[[random.Random, int], list[Case]]:
    """So many cases that have nothing to do with one another."""
    return lambda rng, count: [make(rng) for _ in range(count)]


def rate(
    make: Callable[[random.Random, int], list[Case]], use: Callable[[list[Case]], Callable[[], None]], count: int
) -> float:
    """Responses per processor second; what a job pays once, the worker's start and loading pint, is taken off."""
    use(make(random.Random(-1), 20))()
    cases = make(random.Random(count), count)
    start = processor_seconds(use(cases[:1]))
    return (count - 1) / max(1e-9, processor_seconds(use(cases)) - start)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=4000)
    parser.add_argument("--algebra-responses", type=int, default=400)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", default=None, help="directory of the JSON result (default: benchmarks/results)")
    options = parser.parse_args()
    workloads = {
        "reward, numbers": (one_by_one(numbers), judge, options.responses),
        "reward, choices": (one_by_one(choices), judge, options.responses),
        "reward, algebra": (one_by_one(algebra), judge, options.algebra_responses),
        "reward, algebra, 16 a query": (stream, judge, 2 * options.algebra_responses),
        "prose, numbers": (one_by_one(numbers), read_prose, options.responses),
        "prose, choices": (one_by_one(choices), read_prose, options.responses),
    }
    rates: dict[str, Any] = {name: [] for name in [*workloads, "generate"]}
    config = Config()
    config.generation.max_new_tokens = 32
    distributed.initialize(config.parallel, config.seed)
    family = build_family(config)
    queries = build_queries(config, 16)
    draw = generate_stage(build_model(config, family), family, queries, config)
    for round in range(options.repetitions):
        for name, (make, use, count) in workloads.items():
            rates[name].append(rate(make, use, count + round))
        rates["generate"].append(len(queries) * config.evolve.responses / processor_seconds(draw))
    medians = {name: rounded(statistics.median(values)) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{name:28s} {value:10.1f} responses per second and core")
    result = {
        "command": "python benchmarks/rewards.py",
        "settings": vars(options),
        **environment(),
        "unit": "responses per processor second",
        "response_tokens_generated": config.generation.max_new_tokens,
        "medians": medians,
        "all": {name: [rounded(value) for value in values] for name, values in rates.items()},
        "reward_time_over_generation_time": {
            name: rounded(medians["generate"] / medians[name], 5) for name in workloads
        },
    }
    print(f"written: {write_result('rewards_cpu', result, options.out)}")
    distributed.shutdown()


def rounded(value: float, digits: int = 1) -> float:
    """Rounded for the result file."""
    return round(value, digits)


if __name__ == "__main__":
    main()
