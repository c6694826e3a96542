"""How near a quantised encoder's outputs are to the float model's, text by text.

Axes: B texts, T tokens of the longest, D width of the output.
"""

from collections.abc import Sequence

import numpy as np

_SEED = 0


def similarity_figures(found_BTD: np.ndarray, exact_BTD: np.ndarray, lengths_B: Sequence[int]) -> dict[str, float]:
    """`similarity`: mean over texts of the mean cosine between the two outputs for each token; logits [B, L] count as
    one. With `_low` and `_high`, its 95 % interval, a percentile bootstrap over texts, where there are at least two.
    `similar_texts`: how many there were."""
    from scipy.stats import bootstrap

    of_texts = []
    for found, exact, length in zip(found_BTD, exact_BTD, lengths_B, strict=True):
        if found.ndim > 1:
            found, exact = found[:length], exact[:length]  # behind a text's end the output means nothing
        norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(exact, axis=-1)
        of_texts.append(float(((found * exact).sum(-1) / np.maximum(norms, 1e-30)).mean()))
    figures = {"similarity": float(np.mean(of_texts)), "similar_texts": len(of_texts)}
    if len(of_texts) > 1:
        drawn = bootstrap((of_texts,), np.mean, method="percentile", rng=np.random.default_rng(_SEED))
        ends = drawn.confidence_interval
        figures |= {"similarity_low": float(ends.low), "similarity_high": float(ends.high)}
    return figures
