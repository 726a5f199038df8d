"""Failures of a running job, as the command line reports them."""


class RunError(RuntimeError):
    """A worker failed or did not answer; the message names it and the cause."""


class StuckError(RunError):
    """A remote call did not answer within its deadline."""


class WorkerError(RunError):
    """A worker failed or died; the cause is chained."""
