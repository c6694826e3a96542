"""How well a classifier sorts rows that have a label, and how far rows like them could have said otherwise.

Axes: R rows, L labels.
"""

from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import binomtest

CONFIDENCE = 0.95
RESAMPLES = 1000
_SEED = 0


@dataclass(frozen=True)
class ClassificationFigures:
    """Args:
    accuracy: share of rows whose likeliest label is theirs.
    macro_f1: mean over the labels of the harmonic mean of precision and recall, each label counting alike; a label
        that is neither there nor found does not count.
    accuracy_low, accuracy_high: its 95 % interval (Wilson 1927, doi:10.1080/01621459.1927.10502953), which says
        something of few rows and of none wrong, too.
    macro_f1_low, macro_f1_high: likewise, a percentile bootstrap (Efron 1979, doi:10.1214/aos/1176344552) over rows;
        without a row that is wrong it has no width.
    num_rows, num_labels: how many there were.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    macro_f1: float
    macro_f1_low: float
    macro_f1_high: float
    num_rows: int
    num_labels: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def classification_figures(logits_RL: np.ndarray, labels_R: np.ndarray) -> ClassificationFigures:
    """Figures of a classifier's logits beside the rows' labels, from 0 to L - 1.

    Raises:
        ValueError: no rows, a label that the classifier does not have, or a logit that is no number.
    """
    num_rows = len(labels_R)
    if num_rows == 0 or num_rows != len(logits_RL):
        raise ValueError(f"logits of {len(logits_RL)} rows for {num_rows} labels")
    num_labels = logits_RL.shape[1]
    if labels_R.min() < 0 or labels_R.max() >= num_labels:
        raise ValueError(f"labels from {labels_R.min()} to {labels_R.max()}, the classifier has 0 to {num_labels - 1}")
    if not np.isfinite(logits_RL).all():
        raise ValueError("a logit is not a finite number")
    # Rows with the same label that were found to be the same are alike: drawing rows is drawing from these cells.
    cells, counts = np.unique(labels_R * num_labels + logits_RL.argmax(1), return_counts=True)
    true, found = np.divmod(cells, num_labels)
    right = int(counts[true == found].sum())
    wilson = binomtest(right, num_rows).proportion_ci(CONFIDENCE, method="wilson")
    draw = np.random.default_rng(_SEED)
    drawn = [
        _macro_f1(true, found, draw.multinomial(num_rows, counts / num_rows), num_labels) for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return ClassificationFigures(
        right / num_rows,
        float(wilson.low),
        float(wilson.high),
        _macro_f1(true, found, counts, num_labels),
        float(low),
        float(high),
        num_rows,
        num_labels,
    )


def _macro_f1(true: np.ndarray, found: np.ndarray, counts: np.ndarray, num_labels: int) -> float:
    """Of so many rows with each pair of a label and what was found."""
    right = np.bincount(true, counts * (true == found), num_labels)
    either = np.bincount(true, counts, num_labels) + np.bincount(found, counts, num_labels)
    return float((2 * right[either > 0] / either[either > 0]).mean())
