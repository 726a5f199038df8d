"""Errors of the API, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is not answered; the message names the field, the value and the remedy.

    `retry_after` is in seconds: when the request may be sent again.
    """

    def __init__(
        self, status: int, message: str, *, field: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.field = field
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}


def refused(field: str, message: str) -> ApiError:
    """A field of a request that cannot be used."""
    return ApiError(400, f"{field}: {message}", field=field)
