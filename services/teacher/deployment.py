"""The teacher on Ray Serve: a thin class around `model.py`, and the builder `app`.

    serve run services.teacher.deployment:app model=<directory> replicas=2

Requests that wait are merged up to a token budget while the previous batch runs; nothing waits for company. A bad
request is refused before it is merged, and when a batch fails its requests run alone: none fails its neighbours.
Calls come through handles only: there is no HTTP route.
"""

import logging
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from cluster.logs import setup_logging
from services.teacher.autoscaling import Waits, replicas_wanted
from services.teacher.merging import Merger
from services.teacher.metrics import TeacherMetrics
from services.teacher.schema import ScoreReply, ScoreRequest, TeacherDescription, TeacherServiceConfig
from services.teacher.signals import HeadRecord

logger = logging.getLogger(__name__)


# A replica that dies is noticed by its callers at once and by the controller within a health-check period.
@serve.deployment(
    name="Teacher",
    max_ongoing_requests=32,
    max_constructor_retry_count=3,
    health_check_period_s=5,
    health_check_timeout_s=30,
    logging_config=LoggingConfig(enable_access_log=False),  # a line for each answer costs as much as moving it
)
class Teacher:
    """One replica: one copy of the teacher."""

    def __init__(self, config: TeacherServiceConfig) -> None:
        import torch

        from services.teacher.model import TeacherModel

        setup_logging("INFO")
        torch.set_num_threads(config.threads_per_replica)
        self._model = TeacherModel(config.model, config.dtype, config.tokenizer, config.max_batch_tokens)
        self._merger = Merger(self._model.score, config.max_batch_tokens, TeacherMetrics())
        self._waits = Waits()
        logger.info("teacher %s is ready: %s", config.model, self._model.describe())

    async def describe(self) -> TeacherDescription:
        return self._model.describe()

    async def head(self) -> HeadRecord:
        return self._model.head()

    async def score(self, request: ScoreRequest) -> ScoreReply:
        """The signal for one request; `TeacherFailed` if it can never be answered."""
        self._model.check(request)
        self._waits.add(request.waited_s, request.elapsed_s)
        return await self._merger.reply(request)

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self._waits.take()


def _actor_options(config: TeacherServiceConfig) -> dict[str, Any]:
    """Where a replica goes and what it finds there: Serve hands on a job's working directory alone, so the rest of its
    environment (variables, packages) is said here."""
    options: dict[str, Any] = {"num_cpus": config.threads_per_replica, "num_gpus": config.num_gpus}
    if config.resources:
        options["resources"] = config.resources
    if config.label_selector:
        options["label_selector"] = config.label_selector
    of_job = ray.get_runtime_context().runtime_env if ray.is_initialized() else {}
    environment = {name: of_job[name] for name in ("working_dir", "env_vars", "pip", "uv", "conda") if of_job.get(name)}
    return {**options, "runtime_env": environment} if environment else options


def app(config: TeacherServiceConfig) -> Application:
    """The teacher as a Serve application."""
    highest = max(config.max_replicas or config.replicas, config.replicas)
    deployment = Teacher.options(  # type: ignore[attr-defined]  # made by the decorator
        ray_actor_options=_actor_options(config),
        graceful_shutdown_timeout_s=config.graceful_shutdown_s,
        **(
            {"num_replicas": config.replicas}
            if highest == config.replicas
            else {
                "autoscaling_config": AutoscalingConfig(
                    min_replicas=config.replicas,
                    initial_replicas=config.replicas,
                    max_replicas=highest,
                    target_ongoing_requests=2,
                    upscale_delay_s=10,
                    downscale_delay_s=120,
                    policy=AutoscalingPolicy(policy_function=replicas_wanted),
                )
            }
        ),
    )
    return deployment.bind(config)
