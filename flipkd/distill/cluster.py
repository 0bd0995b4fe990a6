"""Training on several Ray workers: Ray Train around the same loop.

Ray Train places the workers, sets torch.distributed up between them, and when one is lost starts the group again, up to
``--max-retries`` times; each start goes on from the run folder's last whole checkpoint, as in one process. The folder
must lie on a disk that all nodes see. What the workers exchange, says ``flipkd.distill.gradients``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from typing import Any

import torch

from flipkd.distill.config import TrainConfig
from flipkd.distill.facts import summary
from flipkd.distill.gradients import Workers
from flipkd.distill.train import run_path, train_worker
from flipkd.errors import ClusterError, ConfigError, FlipkdError, told_without_data
from flipkd.logs import current_options, log_as_worker
from flipkd.run.cluster import gpus_of_a_worker
from flipkd.run.ray_connection import RAY_LOGGERS, connect

try:
    import ray
    import ray.train
    import ray.train.torch
except ImportError as missing:
    raise ConfigError("--ray needs Ray: pip install 'flipkd[ray]'") from missing

logger = logging.getLogger(__name__)


def train_on_ray(config: TrainConfig) -> dict[str, Any]:
    """Trains on ``config.run.workers`` workers (None: one per GPU, else 1). Returns the summary.

    Raises:
        ConfigError: GPUs are asked for, and the device is the CPU.
        ClusterError: the workers were lost more often than ``max_retries`` allows, or could not be placed in time.
        FlipkdError: what a worker raised.
    """
    run = config.run
    if config.device == "cpu" and run.gpus:
        raise ConfigError("--gpus does not go with --device cpu; leave one of them out")
    connect(str(run.ray))
    resources = ray.cluster_resources()
    gpus = gpus_of_a_worker(run, config.device != "cpu", resources)
    count = run.workers or (int(resources.get("GPU", 0) / gpus) if gpus else 1) or 1
    threads = run.threads or 1
    if not gpus and resources.get("CPU", 0) < count * threads:
        raise ClusterError(
            f"{count} workers of {threads} CPUs do not fit the cluster's {resources.get('CPU', 0):.0f} CPUs; lower "
            "--workers or --threads, or add nodes"
        )
    with tempfile.TemporaryDirectory(prefix="flipkd-train-") as storage:
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"config": config, "threads": threads, "logs": current_options(), "folder": os.getcwd()},
            scaling_config=ray.train.ScalingConfig(
                num_workers=count,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": threads, "GPU": gpus} if gpus else {"CPU": threads},
            ),
            run_config=ray.train.RunConfig(
                storage_path=storage, failure_config=ray.train.FailureConfig(max_failures=run.max_retries)
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray Train wraps whatever a worker raised
            cause = _own_error(error)
            if cause is not None:
                raise cause from error
            raise ClusterError(
                f"training on Ray failed ({type(error).__name__}); checkpoints are kept, run again"
            ) from error
    return summary(config, run_path(config))


def _worker(task: dict[str, Any]) -> None:
    """One worker's share; runs in a process of Ray's, which logs what is raised: so nothing that may quote a record."""
    os.umask(0o077)
    try:
        _train_share(task)
    except FlipkdError as error:
        raise error from None
    except Exception as error:  # such as that of a connection to a worker that has died
        raise ClusterError(
            f"a training worker failed: {told_without_data(error)}; checkpoints are kept, run again"
        ) from None


def _train_share(task: dict[str, Any]) -> None:
    config: TrainConfig = task["config"]
    if task["logs"] is not None:
        log_as_worker(task["logs"], *RAY_LOGGERS)
    # Ray Train starts its workers in a folder of its own; a relative path is meant as the driver sees it.
    with contextlib.suppress(OSError):  # not there on this node: then no path is relative to it
        os.chdir(task["folder"])
    torch.set_num_threads(task["threads"])
    context = ray.train.get_context()
    workers = Workers(context.get_world_rank(), context.get_world_size())
    train_worker(config, workers)


def _own_error(error: BaseException) -> FlipkdError | None:
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, FlipkdError):
            return found
        for inner in getattr(found, "worker_failures", {}).values():
            own = _own_error(inner)
            if own is not None:
                return own
        found = getattr(found, "cause", None) or found.__cause__
    return None
