"""Exceptions whose message is shown to the user in place of a traceback."""


class UserError(Exception):
    """An error that the user can fix; its message is one sentence with the fact and the remedy."""


class DivergenceError(UserError):
    """The end of a training with numbers that are not finite.

    Args:
        reason: The fact, as in "the loss is nan in step 3".
        last: The last finite means of `loss`, `recon` and `kl`; empty if there were none.
    """

    def __init__(self, reason: str, last: dict[str, float]):
        if last:
            reason += " (the last finite loss was {loss:.4g}, recon {recon:.4g}, KL {kl:.4g})".format(**last)
        super().__init__(
            f"training diverged: {reason}; try a smaller optimizer.lr, trainer.gradient_clip_val=1, a warm-up "
            "(lr_schedule.warmup=0.05) or trainer.precision=32-true"
        )


class TrialPruned(Exception):
    """The end of a search's trial that the pruner stopped; the message gives the epoch and its value."""


class RunInterrupted(SystemExit):
    """The end of a run that was asked to stop and has said how to resume it; `code` is 128 plus the signal."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def last_error_line(output: str) -> str:
    """Return the error message at the end of a failed command's output."""
    return (output.splitlines() or ["it was killed"])[-1].removeprefix("error: ")
