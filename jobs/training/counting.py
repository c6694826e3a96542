"""What is counted at a step: added to the state that checkpoints keep, and given out as metrics."""

from dataclasses import replace

from cluster import storage
from jobs.config import TrainConfig
from jobs.training.checkpoint import TrainState
from jobs.training.timing import StepClock
from jobs.training.workers import StepSums, Workers


class StoreTraffic:
    """What this process reads from object storage, writes there and does again, from one look to the next."""

    def __init__(self) -> None:
        self._counted = replace(storage.of_process)

    def count_into(self, sums: StepSums) -> StepSums:
        before, now = self._counted, replace(storage.of_process)
        sums.store_read_bytes = now.read_bytes - before.read_bytes
        sums.store_written_bytes = now.written_bytes - before.written_bytes
        sums.store_retries = now.retries - before.retries
        self._counted = now
        return sums


def count_step(
    state: TrainState,
    sums: StepSums,
    num_rows: int,
    config: TrainConfig,
    seconds: float,
    workers: Workers,
    clock: StepClock,
) -> dict[str, float]:
    """Advances the state by one step and returns the step's metrics; parts of the time are the leader's."""
    wait_s = sums.teacher_wait_s / workers.count
    parts = clock.take(seconds, wait_s)
    positions = max(1.0, sums.positions)
    state.step += 1
    epoch, position = divmod(state.step * config.global_batch, num_rows)
    state.cursor = {"epoch": epoch, "position": position}
    state.losses.append(sums.loss / positions)
    state.cross_entropies.append(sums.cross_entropy / positions)
    state.rows += int(sums.rows)
    state.tokens += int(sums.tokens)
    state.rows_checksum += int(sums.rows_checksum)
    state.teacher_calls += int(sums.teacher_calls)
    state.retries += int(sums.retries)
    state.teacher_wait_s += wait_s
    state.signal_bytes += int(sums.signal_bytes)
    state.teacher_s += sums.teacher_s
    state.labelled_rows += int(sums.labelled_rows)
    state.store_read_bytes += int(sums.store_read_bytes)
    state.store_written_bytes += int(sums.store_written_bytes)
    state.store_retries += int(sums.store_retries)
    state.asked_tokens += int(sums.asked_tokens)
    state.asked_positions += int(sums.asked_positions)
    state.positions += int(sums.positions)
    state.train_s += seconds
    state.parts_s = {name: state.parts_s.get(name, 0.0) + part_s for name, part_s in parts.items()}
    metrics = {
        "train/loss": sums.loss / positions,
        "train/cross_entropy": sums.cross_entropy / positions,
        "train/tokens_per_s": sums.tokens / seconds,
        "train/step_s": seconds,
        "train/workers": workers.count,
        "train/store_wait_s": sums.store_wait_s / workers.count,
        "train/store_read_bytes": sums.store_read_bytes,
        "train/store_written_bytes": sums.store_written_bytes,
        "train/store_retries": sums.store_retries,
        **{f"train/{name}_s": part_s for name, part_s in parts.items() if name != "wait"},
    }
    if sums.teacher_calls or state.teacher_calls or sums.labelled_rows:
        state.divergences.append(sums.divergence / positions)
        metrics |= {
            "train/divergence": sums.divergence / positions,
            "train/agreement": sums.agreements / positions,
            "train/teacher_wait_s": wait_s,
            "train/retries": sums.retries,
            "train/labelled_share": sums.labelled_rows / max(1.0, sums.rows),
        }
    if sums.asked_positions:
        metrics |= {
            "train/signal_bytes_per_position": sums.signal_bytes / sums.asked_positions,
            "teacher/tokens_per_s": sums.asked_tokens / max(sums.teacher_s, 1e-9),
        }
    return metrics
