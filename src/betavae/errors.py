"""Exceptions whose message is shown to the user, and their one-line messages."""


class UserError(Exception):
    """An error that the user can fix.

    Its message is one sentence with the key or file, the fact and the remedy.
    """


class DivergenceError(UserError):
    """A training with a loss or weights that are not finite. `last` holds the last finite means, if any."""

    def __init__(self, reason: str, last: dict[str, float]):
        if last:
            reason += " (the last finite loss was {loss:.4g}, recon {recon:.4g}, KL {kl:.4g})".format(**last)
        super().__init__(
            f"training diverged: {reason}; try a smaller optimizer.lr, trainer.gradient_clip_val=1, a warm-up "
            "(lr_schedule.warmup=0.05) or trainer.precision=32-true"
        )


class TrialPruned(Exception):
    """The end of a trial that its search has pruned. The message has its last result."""


class RunInterrupted(SystemExit):
    """The end of a run that a signal stopped, after it has printed how to resume.

    `code` is 128 plus the signal.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def last_error_line(text: str) -> str:
    """Return the last line that a failed command of this project printed, which says why it failed."""
    return (text.splitlines() or ["it was killed"])[-1].removeprefix("error: ")
