"""Failures of a running job, as the command line reports them."""


class RunError(RuntimeError):
    """A worker failed or did not answer; the message names it and the cause."""


class StuckError(RunError):
    """A remote call did not answer within its deadline."""


class WorkerError(RunError):
    """A worker failed or died; the cause is chained."""


class Stopped(RunError):  # noqa: N818 (an outcome, not an error)
    """The run was asked to stop by a signal and has written a checkpoint; `exit_status` is 128 + the signal."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status
