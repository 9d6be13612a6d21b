"""Several processes of one run: which of them speaks and writes, and how the others hear what it decided."""

import functools
import json
import os
from collections.abc import Callable
from typing import Any

from betavae.errors import UserError


def rank() -> int:
    """0 in the one process that speaks and writes for all; known before there is a Trainer."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ and (name != "SLURM_PROCID" or started_by_srun()):
            return int(os.environ[name]) or node()
    return node()


def node() -> int:
    return 0 if "RANK" in os.environ else int(os.environ.get("NODE_RANK", 0))


def started_by_srun() -> bool:
    """With several tasks; and not in an interactive allocation, where one types `python` oneself."""
    typed = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and not typed


def side_by_side() -> bool:
    """Whether other processes of this run read the same command at this moment, as torchrun and srun start them, or a
    person on each of several nodes. Those that Lightning starts come later, with what was decided in their command."""
    by_others = "TORCHELASTIC_RUN_ID" in os.environ or started_by_srun()
    return by_others or ("NODE_RANK" in os.environ and "LOCAL_RANK" not in os.environ)


def started_by_lightning() -> bool:
    return "LOCAL_RANK" in os.environ and not side_by_side()


def from_rank_zero(decide: Callable[[], Any]) -> Any:
    """What `decide` gives, as JSON has it, or its UserError; where several processes ask, it is asked in rank zero."""
    if not side_by_side():
        return decide()
    line, number = _line(), next(_numbers)
    if rank():
        answer, error = json.loads(line.get(f"betavae/{number}"))
        if error:
            raise UserError(error)
        return answer
    try:
        answer = decide()
    except UserError as error:
        line.set(f"betavae/{number}", json.dumps((None, str(error))))
        raise
    line.set(f"betavae/{number}", json.dumps((answer, None)))
    return answer


_numbers = iter(range(10**9))


@functools.cache
def _line() -> Any:
    """torch's store of keys and values that all processes reach: torchrun's, or one beside the run's own port."""
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
    from torch.distributed import PrefixStore, TCPStore

    torchrun = TorchElasticEnvironment.detect()
    environment: Any = TorchElasticEnvironment() if torchrun else LightningEnvironment()
    if not torchrun and started_by_srun():
        environment = SLURMEnvironment(auto_requeue=False)
    host, port = environment.main_address, environment.main_port
    if torchrun and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], TCPStore(host, port, is_master=False))
    return TCPStore(host, port + 1, is_master=rank() == 0, wait_for_workers=False)
