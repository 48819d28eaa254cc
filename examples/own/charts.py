"""A set of one's own to try with: bar charts and questions about them, as {image, question, answer} in one CSV.

    python examples/own/charts.py charts 500        # 500 questions about 250 charts, a few seconds
    mstar data check charts/questions.csv

docs/data.md goes on from there.
"""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 96
"""Of a chart, in pixels."""
COLOURS = {"red": (200, 60, 50), "blue": (50, 90, 190), "green": (40, 140, 80)}


def draw(heights: list[int], colour: str) -> Image.Image:
    """Bars of these heights, from 1 to 5."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(picture)
    width = SIDE // len(heights)
    for i, height in enumerate(heights):
        pen.rectangle((i * width + 4, SIDE - height * 17, (i + 1) * width - 4, SIDE - 1), fill=COLOURS[colour])
    return picture


def make(folder: Path, questions: int, seed: int = 0) -> Path:
    """Write ``questions`` questions, two about each chart; returns the CSV's path."""
    dice = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range((questions + 1) // 2):
        heights = [dice.randint(1, 5) for _ in range(dice.randint(1, 5))]
        colour = dice.choice(list(COLOURS))
        name = f"images/{number:04d}.png"
        draw(heights, colour).save(folder / name)
        rows.append({"image": name, "question": "How many bars are there?", "answer": len(heights), "choices": ""})
        if dice.random() < 0.5:
            rows.append(
                {"image": name, "question": "How high is the tallest bar?", "answer": max(heights), "choices": ""}
            )
        else:
            choices = " | ".join(COLOURS)
            rows.append({"image": name, "question": "What colour?", "answer": colour, "choices": choices})
    path = folder / "questions.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "question", "answer", "choices"])
        writer.writeheader()
        writer.writerows(rows[:questions])
    return path


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 500))
