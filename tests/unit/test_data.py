"""Rows, their order, and micro-batches: which token is predicted from where, and who trains what."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import StorageError
from jobs.training.data import GlobalBatches, Row, RowId, collate, epoch_order, rows_checksum


class Rows:
    """A store in memory."""

    def __init__(self, number: int) -> None:
        self._rows = [
            row([number, number + 1, number + 2], [3], shard=number % 3, place=number) for number in range(number)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        return self._rows[index]

    def row_id(self, index: int) -> RowId:
        return self._rows[index].id


def row(tokens, segments, mask=None, shard=0, place=0, num_bytes=0) -> Row:
    return Row(
        RowId(shard, place),
        np.array(tokens, np.int32),
        np.array(segments, np.int32),
        np.array(mask if mask is not None else [1] * len(tokens), np.int8),
        num_bytes,
    )


def test_collate_predicts_successors_within_a_piece_only():
    batch = collate([row([10, 11, 12, 20, 21], [3, 2]), row([30, 31], [2])])
    assert batch.token_ids.tolist() == [10, 11, 12, 20, 21, 30, 31]
    assert batch.sequence_lengths.tolist() == [3, 2, 2]
    assert batch.positions.tolist() == [0, 1, 3, 5]
    assert batch.row_lengths.tolist() == [5, 2]
    assert batch.targets.tolist() == [11, 12, 21, 31]


def test_collate_shifts_the_mask_with_the_prediction():
    # Token 2 (value 12) does not count as a target; the position before it is dropped, not the position of 12.
    batch = collate([row([10, 11, 12, 13], [4], mask=[1, 1, 0, 1])])
    assert batch.positions.tolist() == [0, 2]
    assert batch.targets.tolist() == [11, 13]


def test_collate_of_a_fully_masked_row_scores_nothing():
    batch = collate([row([1, 2, 3], [3], mask=[0, 0, 0])])
    assert len(batch.positions) == len(batch.targets) == 0


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    order = epoch_order(3, 1, 100)
    assert sorted(order) == list(range(100))
    assert np.array_equal(order, epoch_order(3, 1, 100))
    assert not np.array_equal(order, epoch_order(3, 2, 100))
    assert not np.array_equal(order, epoch_order(4, 1, 100))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    global_batch=st.integers(1, 24),
    workers=st.integers(1, 5),
    micro_batch=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 6),
    lives=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), max_size=4),
)
def test_batches_rows_of_a_step_do_not_depend_on_workers_micro_batch_or_interruptions(
    rows, global_batch, workers, micro_batch, seed, steps, lives
):
    batches = GlobalBatches(Rows(rows), global_batch, seed)
    expected = {step: sorted(str(item) for item in batches.row_ids(step)) for step in range(steps)}
    found = {step: [] for step in range(steps)}
    done = 0
    # Killed after some steps, each time; resumed from the cursor with another number of workers.
    for length, workers_now in [*lives, (steps, workers)]:
        part = range(done, min(steps, done + length))
        for rank in range(count := min(workers_now, global_batch)):
            last_seen = dict.fromkeys(part, 0)
            for batch in GlobalBatches(Rows(rows), global_batch, seed).micro_batches(part, rank, count, micro_batch):
                assert len(batch.row_ids) <= micro_batch
                found[batch.step].extend(str(item) for item in batch.row_ids)
                last_seen[batch.step] += batch.last
            assert set(last_seen.values()) <= {1}
        done = part.stop
    assert {step: sorted(ids) for step, ids in found.items()} == expected


def test_batches_are_read_ahead_and_in_order_from_a_slow_store():
    class Slow(Rows):
        reading = most = 0
        lock = threading.Lock()

        def row(self, index):
            with self.lock:
                self.reading += 1
                self.most = max(self.most, self.reading)
            time.sleep(0.002 * (index % 3))
            with self.lock:
                self.reading -= 1
            return super().row(index)

    slow = Slow(50)
    batches = GlobalBatches(slow, 10, 0)
    found = [str(item) for batch in batches.micro_batches(range(10), 0, 1, 4) for item in batch.row_ids]
    assert found == [str(item) for step in range(10) for item in GlobalBatches(Rows(50), 10, 0).row_ids(step)]
    assert slow.most > 4
    assert batches.take_waited_s() > 0
    assert batches.take_waited_s() == 0


def test_batches_pass_on_why_a_row_cannot_be_read():
    class Broken(Rows):
        def row(self, index):
            if index == 7:
                raise StorageError("gone")
            return super().row(index)

    with pytest.raises(StorageError, match="gone"):
        list(GlobalBatches(Broken(10), 10, 0).micro_batches(range(3), 0, 1, 2))


@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 1000))
def test_batches_every_epoch_visits_every_row_once(rows, global_batch, seed):
    batches = GlobalBatches(Rows(rows), global_batch, seed)
    steps = -(-2 * rows // global_batch)
    visited = [index for step in range(steps) for index in batches.indices(step)][: 2 * rows]
    assert sorted(visited[:rows]) == sorted(visited[rows:]) == list(range(rows))


def test_rows_checksum_adds_up_and_ignores_order_but_not_repeats():
    ids = tuple(RowId(0, number) for number in range(10))
    assert rows_checksum(ids) == rows_checksum(ids[::-1]) == rows_checksum(ids[:4]) + rows_checksum(ids[4:])
    assert rows_checksum(ids) != rows_checksum((*ids[:9], ids[0]))


def test_row_id_reads_as_shard_and_row():
    assert str(RowId(3, 14)) == "3:14"
    with pytest.raises(AttributeError):
        RowId(3, 14).row = 2  # type: ignore[misc]
