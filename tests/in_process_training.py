"""The training of a run's config in this process, on a store that is prepared: no Ray, nothing that could be lost.

What a run on a cluster must come to, whatever happened to it on the way.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch

from cluster.config import load
from cluster.storage import open_storage
from jobs.config import RunConfig
from jobs.training.choice import choose_signal
from jobs.training.loop import train
from jobs.training.plan import TeacherAccess, TrainPlan
from jobs.training.workers import Workers
from services.teacher.model import TeacherModel
from tests.in_process_teacher import InProcessTeacher


def trained_here(config_file: Path, *overrides: str) -> dict[str, Any]:
    """What `train` gives on one worker, for a config whose teacher and student are directories.

    Args:
        overrides: as on the command line; `storage` must be the root of a run whose corpus is prepared.
    """
    config = load(RunConfig, config_file, list(overrides))
    prepared = open_storage(config.storage).read_json("summary.json")["stages"]["prepare"]
    model = None
    access = None
    with contextlib.ExitStack() as stack:
        teacher = None
        if config.teacher is not None:
            model = str(config.teacher.model)
            loaded = TeacherModel(model, config.teacher.dtype)
            teacher = InProcessTeacher(loaded)
            stack.callback(teacher.close)
            access = TeacherAccess(
                app_name="none",
                fingerprint="",
                signal=choose_signal(config.distill, loaded.describe())[0],
                attempt_timeout_s=1,
                deadline_s=1,
                window_bytes=1 << 20,
            )
        plan = TrainPlan(
            storage=config.storage,
            prefix="student/in-process",
            store=prepared["store"],
            tokenizer=prepared["tokenizer"],
            student=config.student,
            teacher_model=model,
            teacher=access,
            distill=config.distill,
            train=config.train.replace(num_workers=1),
            threads=1,
        )
        return train(plan, Workers(0, 1, torch.device("cpu")), teacher, lambda step, metrics: None)
