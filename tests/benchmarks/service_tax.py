"""What the service costs: a training step with a teacher on Ray Serve against the same arithmetic in one process, on
the same cores: `python -m tests.benchmarks.service_tax`.

Both sides are the training loop. In one process the teacher is called when an answer is wanted and computes at once;
with the service it is another process that works ahead while the student trains.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from services.teacher.client import ClientCounters
from services.teacher.model import TeacherModel
from services.teacher.schema import ScoreReply, ScoreRequest, TeacherDescription
from services.teacher.signals import HeadRecord
from tests.benchmarks import end_to_end
from tests.benchmarks.paced import PacedTraining
from tests.benchmarks.sides import OUR_SETTINGS, Side, arguments, show, take_turns


class DirectTeacher:
    """A teacher that computes in the calling thread."""

    def __init__(self, model: str) -> None:
        self.counters = ClientCounters()
        self._model = TeacherModel(model)

    def describe(self) -> TeacherDescription:
        return self._model.describe()

    def head(self) -> HeadRecord:
        return self._model.head()

    def submit(self, request: ScoreRequest) -> "Future[ScoreReply]":
        answer: Future[ScoreReply] = Future()
        self.counters.calls += 1
        answer.set_result(self._model.score([request])[0])
        return answer


def side(name: str, options: dict[str, Any]) -> Callable[[], dict[str, float]]:
    directory = Path(options["directory"])

    def start(step: Callable[[], None]) -> None:
        if name == "one process":
            end_to_end.train_with(DirectTeacher(str(directory / "teacher")), directory, step)
        else:
            end_to_end.with_service(name, directory, step)

    training = PacedTraining(start, end_to_end.ANSWERS_AHEAD, options["counted"])
    return lambda: {"seconds": training.turn()}


def main() -> None:
    options = arguments(__doc__ or "")
    rows, ratios = [], {}
    for vocab_size in (8_192,) if options.quick else (512, 8_192, 32_000):
        with tempfile.TemporaryDirectory(prefix="raystill-bench-") as directory:
            end_to_end.make_inputs(Path(directory), vocab_size)
            values = {"directory": directory, "counted": 4 if options.quick else 8}
            sides = [
                Side("tests.benchmarks.service_tax", name, values, OUR_SETTINGS) for name in ("one process", "service")
            ]
            take_turns(sides, options.repeats or 7)
            for item in sides:
                item.close()
        direct, served = sides
        ratios[str(vocab_size)] = served.median_s / direct.median_s
        times = [f"{item.median_s * 1000:,.1f}" for item in sides]
        rows.append([f"V={vocab_size:,}", *times, f"{ratios[str(vocab_size)]:.3f}"])
    columns = ["", "one process, ms", "service, ms", "ratio"]
    result = {"ratio": ratios["8192"], "ratios": ratios}
    show("A step of 8 x 256 tokens, Llama 8 x 512 to 4 x 256 (medians)", columns, rows, result)


if __name__ == "__main__":
    main()
