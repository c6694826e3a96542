"""What the driver tells every train worker. Plain data; imports neither torch nor ray."""

from typing import Any

from cluster.config import Config
from jobs.config import DistillConfig, StudentConfig, TrainConfig
from services.teacher.signals import SignalSpec


class TeacherAccess(Config):
    """How a worker reaches the teacher service, what it asks for, and how far ahead it may ask."""

    app_name: str | None
    """None where labels say everything and no teacher was started."""
    fingerprint: str
    signal: SignalSpec
    """Its columns are the teacher's; a worker asks for those that its student has too."""
    attempt_timeout_s: float
    deadline_s: float
    window_bytes: int


class LabelAccess(Config):
    """Where labels lie, and what a worker does with them."""

    root: str
    """URI of all label stores."""
    reads: bool
    writes: bool


class TrainPlan(Config):
    """One training, of a student or of a teacher.

    Args:
        storage: root URI of the run.
        prefix: where checkpoints and the finished model go, below the root.
        store: prefix of the example store.
        tokenizer: directory or hub id.
        student: how the initial model is made.
        teacher_model: directory or hub id of the teacher, for the initial model; None without one.
        teacher: the service to ask; None trains on the text alone.
        labels: where to look before it is asked, or to keep what it says.
    """

    storage: str
    prefix: str
    store: str
    tokenizer: str
    student: StudentConfig
    teacher_model: str | None
    teacher: TeacherAccess | None
    labels: LabelAccess | None = None
    distill: DistillConfig
    train: TrainConfig
    threads: int
    """Per worker."""

    def decides(self, store_fingerprint: str) -> dict[str, Any]:
        """What decides the trained weights, as JSON values; where and how fast is left out, so that a run can move."""
        return {
            "train": self.train.identity(),
            "student": self.student.identity(),
            "distill": self.distill.identity() if self.teacher is not None else None,
            "store": store_fingerprint,
        }
