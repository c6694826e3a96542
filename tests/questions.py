"""Small sets of multiple-choice questions in the columns of MMLU and HellaSwag."""

from typing import Any

MMLU: dict[str, Any] = {
    "question": "What does the cat see?",
    "subject": "world_history",
    "choices": ["the river", "a red house", "nothing", "seven stones"],
    "answer": 2,
}


def mmlu() -> list[dict[str, Any]]:
    """Five questions of one subject and three of another."""
    things = ["the river", "a red house", "nothing", "seven stones"]
    subjects = ["world_history"] * 5 + ["algebra"] * 3
    return [
        {
            "question": f" What does number {place} see? ",
            "subject": subject,
            "choices": things[place % 4 :] + things[: place % 4],
            "answer": place % 4,
        }
        for place, subject in enumerate(subjects)
    ]


def hellaswag() -> list[dict[str, Any]]:
    """Six beginnings with endings of different length; answers are texts, as in the published files."""
    return [
        {
            "ind": place,
            "activity_label": "Painting",
            "ctx_a": f"Neighbour {place} [header] paints.",
            "ctx_b": "every student" if place % 2 else "",
            "endings": ["sees.", f"remembers the {place} old  clocks and the river.", "forgets a plan.", "carries on."],
            "label": str(place % 4),
        }
        for place in range(6)
    ]
