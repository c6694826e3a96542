"""Distillation as Ray's own documentation would have it, with its defaults: a Serve handle and a TorchTrainer.

`tests.benchmarks.elastic` puts the same faults to it: `python -m tests.benchmarks.plain_ray ADDRESS DIRECTORY REPORT`.
Each step is written to REPORT as a line of JSON.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.train import Checkpoint, RunConfig, ScalingConfig, get_checkpoint, get_context, report
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn

WIDTH, STEPS = 64, 100_000


@serve.deployment(name="Plain", num_replicas=2, ray_actor_options={"num_cpus": 1})
class PlainTeacher:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self._model = nn.Linear(WIDTH, WIDTH)

    async def score(self, rows: Any) -> Any:
        with torch.no_grad():
            return self._model(torch.from_numpy(rows)).numpy()


def loop(config: dict[str, Any]) -> None:
    """One worker: asks, learns, reports; a checkpoint every fifty steps."""
    teacher = serve.get_deployment_handle("Plain", app_name="plain")
    model = prepare_model(nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    start, rank = 0, get_context().get_world_rank()
    if (last := get_checkpoint()) is not None:
        with last.as_directory() as directory:
            saved = torch.load(Path(directory) / "state.pt", weights_only=True)
            model.load_state_dict(saved["model"])
            start = saved["step"]
    for step in range(start + 1, STEPS):
        rows = torch.randn(8, WIDTH)
        answer = torch.from_numpy(teacher.score.remote(rows.numpy()).result().copy())
        loss = nn.functional.mse_loss(model(rows), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            with Path(config["report"]).open("a") as file:
                file.write(json.dumps({"step": step, "at": time.time()}) + "\n")
        if step % 50 == 0:
            with tempfile.TemporaryDirectory() as name:
                if rank == 0:
                    torch.save({"model": model.state_dict(), "step": step}, Path(name) / "state.pt")
                report({"loss": loss.item()}, checkpoint=Checkpoint.from_directory(name) if rank == 0 else None)


def main() -> None:
    address, directory, path = sys.argv[1:]
    ray.init(address, logging_level="ERROR", log_to_driver=False)
    serve.run(PlainTeacher.bind(), name="plain", route_prefix=None)
    TorchTrainer(
        loop,
        train_loop_config={"report": path},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name=Path(path).stem, storage_path=directory),
    ).fit()


if __name__ == "__main__":
    main()
