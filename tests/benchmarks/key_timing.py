"""Does the time of a refusal tell how much of a key was right? `python -m tests.benchmarks.key_timing`.

Welch's t-test, as the leakage tests of hardware do it (Goodwill et al., 2011: |t| above 4.5 is a leak), of the time
that one check takes, for keys that are wrong in the secret's first letter against keys that are wrong in its last. Both
classes take turns in random order; the slowest tenth is left out, which is other work on the machine.
"""

import random
import tempfile
import time

from scipy.stats import ttest_ind

from cluster.api_keys import create_key, find_key, list_keys, opened_keys
from tests.benchmarks.sides import arguments, show


def main() -> None:
    count = 50_000 if arguments(__doc__ or "").quick else 500_000
    chance = random.Random(0)
    with (
        tempfile.TemporaryDirectory(prefix="raystill-bench-") as name,
        opened_keys(f"sqlite:///{name}/keys.db") as engine,
    ):
        text = create_key(engine, "alice")[1]
        keys = {key.id: key for key in list_keys(engine)}

    def wrong_at(place: int) -> bytes:
        letter = "A" if text[place] != "A" else "B"
        return (text[:place] + letter + (text[place + 1 :] if place != -1 else "")).encode()

    unknown = f"rs-{'0' * 10}{text[13:]}".encode()
    classes = {"first letter": wrong_at(14), "last letter": wrong_at(-1), "unknown id": unknown}
    times_ns: dict[str, list[int]] = {name: [] for name in classes}
    order = [name for name in classes for _ in range(count)]
    chance.shuffle(order)
    for name in order:
        presented = classes[name]
        started = time.perf_counter_ns()
        found = find_key(keys, presented)
        times_ns[name].append(time.perf_counter_ns() - started)
        assert found is None
    kept = {name: sorted(values)[: len(values) * 9 // 10] for name, values in times_ns.items()}
    rows = [[name, f"{sum(values) / len(values):.1f}"] for name, values in kept.items()]
    t = {name: float(ttest_ind(kept["first letter"], kept[name], equal_var=False).statistic) for name in list(kept)[1:]}
    result = {"t_prefix": round(t["last letter"], 2), "t_unknown_id": round(t["unknown id"], 2), "checks": len(order)}
    show("Time of a refusal (mean ns; |t| over 4.5 would be a leak)", ["wrong", "ns"], rows, result)


if __name__ == "__main__":
    main()
