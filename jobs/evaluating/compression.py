"""What a model is beside its teacher: how much smaller, and how much of the quality is left. Plain arithmetic."""

from typing import Any


def with_compression(models: dict[str, dict[str, Any]], teacher: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The same figures with those that need the teacher's; without a teacher nothing is added.

    `size_ratio` and `parameter_ratio`: how many times the teacher's bytes on disk and parameters are the model's.
    `retention_percent`: 100 * `quality_kept`. `task/NAME/retention_percent`:
    100 * (accuracy - chance) / (the teacher's accuracy - chance), negative for a model that does worse than chance;
    absent where the teacher does no better than chance.
    """
    if teacher is None:
        return models
    return {name: {**figures, **_beside(figures, teacher)} for name, figures in models.items()}


def quality_kept(teacher_bits_per_byte: float, bits_per_byte: float) -> float:
    """The share of the teacher's quality that is left: 1 for a model that predicts held-out text as well as the
    teacher, 0.5 for one that needs twice the bits."""
    return teacher_bits_per_byte / bits_per_byte


def _beside(figures: dict[str, Any], teacher: dict[str, Any]) -> dict[str, float]:
    out = {
        "size_ratio": teacher["bytes"] / figures["bytes"],
        "parameter_ratio": teacher["parameters"] / figures["parameters"],
        "retention_percent": 100 * quality_kept(teacher["bits_per_byte"], figures["bits_per_byte"]),
    }
    for name in figures:
        if name.startswith("task/") and name.endswith("/acc") and name in teacher:
            chance = figures[f"{name.removesuffix('/acc')}/chance"]
            if teacher[name] > chance:
                kept = 100 * ((figures[name] - chance) / (teacher[name] - chance))
                out[f"{name.removesuffix('/acc')}/retention_percent"] = kept
    return out
