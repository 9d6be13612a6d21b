"""The exceptions whose message is meant for the person at the terminal."""


class UserError(Exception):
    """Something the user can put right. The message is one sentence: the key or file, what is wrong, what is right."""


class DivergenceError(UserError):
    """The training left the finite numbers. `last` holds the last finite means, if there were any."""

    def __init__(self, what: str, last: dict[str, float]):
        if last:
            what += " (the last finite loss was {loss:.4g}, recon {recon:.4g}, KL {kl:.4g})".format(**last)
        super().__init__(
            f"training diverged: {what}; try a smaller optimizer.lr, trainer.gradient_clip_val=1, a warm-up "
            "(lr_schedule.warmup=0.05) or trainer.precision=32-true"
        )


class TrialPruned(Exception):
    """The end of a trial that its search has found hopeless. The message says what it came to."""


class RunInterrupted(SystemExit):
    """The end of a run that was asked to stop, and has said how it goes on. `code` is 128 plus the signal's number."""


def last_error_line(text: str) -> str:
    """Of what a command of ours printed that failed: why."""
    return (text.splitlines() or ["it was killed"])[-1].removeprefix("error: ")
