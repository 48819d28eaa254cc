"""The recipe's loop in a page of Python: docs/api.md shows what it prints.

    python examples/own/evolve.py runs/own              # one process, about a minute
    torchrun --nproc-per-node 2 examples/own/evolve.py runs/own

Every call is one that `mstar evolve` makes as well. What an earlier start of this program finished, up to the PRM, is
read back from the run directory.
"""

import sys

import mstar_mega as mstar


def main(directory: str, **groups: dict[str, object]) -> float:
    """Two rounds of generate, reward, score, select and train; returns the accuracy in the end."""
    config = mstar.load_config("smoke", run={"dir": directory}, selection={"k": 2, "distinct": True}, **groups)
    with mstar.open_session(config) as session:
        session.warmup()
        session.train_prm(session.annotate())
        before = session.evaluate("validation")

        labelled = session.task.labelled
        share = len(labelled) // 2
        for number in range(2):
            queries = labelled[number * share : (number + 1) * share]
            groups_ = session.generate(queries, temperature=1.0, name=f"round {number}")
            session.reward(groups_)
            session.score(groups_)
            examples = session.select(groups_, name=f"round {number}")
            steps = session.train(examples)
            correct = sum(response.correct is True for group in groups_ for response in group.responses)
            session.job.say(f"round {number}: {correct} correct, {examples.responses} selected, {len(steps)} steps")

        after = session.evaluate("validation")
        session.save()
        session.export(f"{directory}/hf")
        session.job.say(f"accuracy {100 * before:.1f}% -> {100 * after:.1f}%; the policy is in {directory}/hf")
        return after


if __name__ == "__main__":
    main(sys.argv[1])
