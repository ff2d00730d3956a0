"""What every error has."""

from __future__ import annotations

from typing import Any, ClassVar


class CloudAgentError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "internal"
    remedy: str = "Try again; if it happens again, run `ca doctor`."
    field: str | None = None

    def __init__(self, message: str | None = None, *, remedy: str | None = None, field: str | None = None) -> None:
        self.message = message or " ".join((type(self).__doc__ or "").split())
        if remedy is not None:
            self.remedy = remedy
        if field is not None:
            self.field = field
        super().__init__(self.message)

    def as_dict(self) -> dict[str, Any]:
        """The error as every face shows it: code, detail, remedy, field."""
        return {"code": self.code, "detail": self.message, "remedy": self.remedy, "field": self.field}
