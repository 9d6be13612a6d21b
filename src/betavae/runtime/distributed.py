"""Several processes of one run: which of them speaks and writes, and how the others hear what it decided."""

import contextlib
import functools
import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from betavae.errors import UserError

ONE_DEVICE_MESSAGE = (
    "a sweep trains each job on one device: leave trainer.devices and trainer.num_nodes at 1 and run jobs side by side "
    "(hydra/launcher=joblib), or start runs on several devices one by one without -m"
)


def rank() -> int:
    """0 in the one process that speaks and writes for all; known before there is a Trainer."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ and (name != "SLURM_PROCID" or started_by_srun()):
            return int(os.environ[name]) or node_rank()
    return node_rank()


def node_rank() -> int:
    return 0 if "RANK" in os.environ else int(os.environ.get("NODE_RANK", 0))


def started_by_srun() -> bool:
    """With several tasks; and not in an interactive allocation, where one types `python` oneself."""
    typed = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and not typed


def externally_launched() -> bool:
    """Whether other processes of this run read the same command at this moment, as torchrun and srun start them, or a
    person on each of several nodes. Those that Lightning starts come later, with what was decided in their command."""
    by_others = "TORCHELASTIC_RUN_ID" in os.environ or started_by_srun()
    return by_others or ("NODE_RANK" in os.environ and "LOCAL_RANK" not in os.environ)


def started_by_lightning() -> bool:
    return "LOCAL_RANK" in os.environ and not externally_launched()


def broadcast_from_rank_zero(fn: Callable[[], Any]) -> Any:
    """What `decide` gives, as JSON has it, or its UserError; where several processes ask, it is asked in rank zero."""
    if not externally_launched():
        return fn()
    line, key = _store(), f"betavae/{next(_message_ids)}"
    if rank():
        answer, error = json.loads(line.get(key))
        if error:
            line.set(f"{key}/heard by {rank()}", "")
            raise UserError(error)
        return answer
    try:
        answer = fn()
    except UserError as error:
        line.set(key, json.dumps((None, str(error))))
        # The store may be this process' own, and end with it while the others have yet to reach it.
        # How many come is known of torchrun and srun, and not of nodes that persons start.
        others = [f"{key}/heard by {other}" for other in range(1, _environment().world_size())]
        with contextlib.suppress(RuntimeError):  # one that never comes
            line.wait(others, timedelta(minutes=1))
        raise
    line.set(key, json.dumps((answer, None)))
    return answer


_message_ids = iter(range(10**9))


def _environment() -> Any:
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False) if started_by_srun() else LightningEnvironment()


@functools.cache
def _store() -> Any:
    """torch's store of keys and values that all processes reach: torchrun's, or one beside the run's own port."""
    from torch.distributed import PrefixStore, TCPStore

    environment = _environment()
    host, port = environment.main_address, environment.main_port
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], TCPStore(host, port, is_master=False))
    try:
        return TCPStore(host, port + 1, is_master=rank() == 0, wait_for_workers=False)
    except RuntimeError as error:
        raise UserError(
            f"MASTER_PORT={port}: the processes of this run meet at the port above it too, {port + 1}, which cannot be "
            f"had on {host}; set another ({str(error).splitlines()[0]})"
        ) from error
