"""How well a classifier sorts rows that have a label.

Axes: R rows, L labels.
"""

from dataclasses import asdict, dataclass

import numpy as np
from sklearn.metrics import accuracy_score, f1_score


@dataclass(frozen=True)
class ClassificationFigures:
    """Args:
    accuracy: share of rows whose likeliest label is theirs.
    macro_f1: mean over the labels of the harmonic mean of precision and recall, each label counting alike; a label
        that is neither there nor found does not count.
    rows, labels: how many there were.
    """

    accuracy: float
    macro_f1: float
    rows: int
    labels: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def classification_figures(logits_RL: np.ndarray, labels_R: np.ndarray) -> ClassificationFigures:
    """Figures of a classifier's logits beside the rows' labels, from 0 to L - 1.

    Raises:
        ValueError: no rows, a label that the classifier does not have, or a logit that is no number.
    """
    if len(labels_R) == 0 or len(labels_R) != len(logits_RL):
        raise ValueError(f"logits of {len(logits_RL)} rows for {len(labels_R)} labels")
    if labels_R.min() < 0 or labels_R.max() >= logits_RL.shape[1]:
        raise ValueError(
            f"labels from {labels_R.min()} to {labels_R.max()}, the classifier has 0 to {logits_RL.shape[1] - 1}"
        )
    if not np.isfinite(logits_RL).all():
        raise ValueError("a logit is not a finite number")
    found_R = logits_RL.argmax(1)
    return ClassificationFigures(
        float(accuracy_score(labels_R, found_R)),
        float(f1_score(labels_R, found_R, average="macro", zero_division=0.0)),
        len(labels_R),
        logits_RL.shape[1],
    )
