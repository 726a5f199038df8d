"""The base of all configuration models."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Unknown keys are errors, and instances do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
