"""Answers that nobody writes in good faith: what no code that reads answers may hang or crash on."""

from __future__ import annotations

HOSTILE = [
    "9^{9^{9^{9}}}", "1e999999999", "9" * 10_000_000, "x" * 1_000_000, "(" * 1_000_000, "{" * 500_000,
    "\\boxed{" * 200_000, "\\te" * 100 + "xt{" * 100, "(" * 250 + "x" + ")" * 250, "\\frac{" * 80 + "x" + "}{2}" * 80,
    "%s%n{0.__class__}", "{x!r:>999999999}", "\x00\x01\x02x+1", "\u0661+\u0662", "\uff11\uff0b\uff12", "\ud800+1",
    "__import__('os').system('true')", "$" * 100_000, "\n" * 1_000_000, " " * 1_000_000 + "!", "_" * 100_001,
    "x" + "!" * 500, "-" * 500 + "1x", "1" + "+1" * 60 + "+x", "\\\\\\", "x_{", "|" * 513 + "1",
    "the answer is " * 100_000, "answer is not " * 100_000, "(A) " * 300_000, "1,000" * 200_000, "[" * 500_000,
    "between 1 " * 100_000, "not a b c " * 100_000, "\\boxed{{" * 100_000, "\nQuestion: " * 100_000,
    "1" + ",000" * 250_000,
    "there are a b " * 80_000, "# Answer\n\n" * 100_000, "5 " + "square " * 1000 + "m",
    "(1," * 300, "1,2," * 120, "1e1e1" * 9000,
]  # fmt: skip
