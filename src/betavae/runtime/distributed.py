"""Ranks of the processes of one run, and broadcasts before Lightning has a process group."""

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from betavae.errors import UserError, first_line

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment
    from torch.distributed import Store

ONE_DEVICE_MESSAGE = (
    "a sweep trains each job on one device: leave trainer.devices and trainer.num_nodes at 1 and run jobs side by side "
    "(hydra/launcher=joblib), or start runs on several devices one by one without -m"
)


def rank() -> int:
    """Return the rank of this process, which is known before there is a Trainer."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ and (name != "SLURM_PROCID" or started_by_srun()):
            return int(os.environ[name]) or node_rank()
    return node_rank()


def node_rank() -> int:
    """Return the rank of this node if a person started the run on each of several nodes, else 0."""
    return 0 if "RANK" in os.environ else int(os.environ.get("NODE_RANK", 0))


def started_by_srun() -> bool:
    """Return whether srun started this process as one of several tasks, and not an interactive shell."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and not interactive


def externally_launched() -> bool:
    """Return whether an external launcher started all processes of this run at once.

    The launcher is torchrun, srun or a person on several nodes. Lightning starts its processes later, with the
    decisions of the first one in their arguments.
    """
    by_launcher = "TORCHELASTIC_RUN_ID" in os.environ or started_by_srun()
    return by_launcher or ("NODE_RANK" in os.environ and "LOCAL_RANK" not in os.environ)


def started_by_lightning() -> bool:
    """Return whether Lightning started this process."""
    return "LOCAL_RANK" in os.environ and not externally_launched()


def broadcast_from_rank_zero(fn: Callable[[], Any]) -> Any:
    """Call a function in rank zero only, and broadcast its outcome.

    Every process returns its JSON value or raises its UserError.
    """
    if not externally_launched():
        return fn()
    store, key = connect_store(), f"betavae/{next(message_ids)}"
    if rank():
        answer, error = json.loads(store.get(key))
        if error:
            store.set(f"{key}/received by {rank()}", "")
            raise UserError(error)
        return answer
    try:
        answer = fn()
    except UserError as error:
        store.set(key, json.dumps((None, str(error))))
        # This process may host the store, so it waits until the others have read the error. The number of processes
        # is known of torchrun and srun, and not of nodes that a person starts.
        received = [f"{key}/received by {other}" for other in range(1, cluster_environment().world_size())]
        with contextlib.suppress(RuntimeError):  # another process has not started within a minute
            store.wait(received, timedelta(minutes=1))
        raise
    store.set(key, json.dumps((answer, None)))
    return answer


message_ids = itertools.count()


def cluster_environment() -> "ClusterEnvironment":
    """Return Lightning's view of the launcher."""
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False) if started_by_srun() else LightningEnvironment()


@functools.cache
def connect_store() -> "Store":
    """Connect to torchrun's key-value store, or to one at the port above the run's own."""
    from torch.distributed import PrefixStore, TCPStore

    environment = cluster_environment()
    host, port = environment.main_address, environment.main_port
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], TCPStore(host, port, is_master=False))
    try:
        return TCPStore(host, port + 1, is_master=rank() == 0, wait_for_workers=False)
    except RuntimeError as error:
        raise UserError(
            f"MASTER_PORT={port} is invalid: expected a port with a free one above it, and {port + 1} is not available "
            f"on {host} ({first_line(error)})"
        ) from error
