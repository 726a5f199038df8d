"""The base of all configuration models."""

from typing import Any, Final

from pydantic import BaseModel, ConfigDict

# Mark of a field, or of a whole section, that changes how a run goes but not what it trains, rounding aside. It may
# differ when a run goes on. Every field without it changes what is trained.
OPERATION: Final[dict[str, Any]] = {"changes_training": False}


class Section(BaseModel):
    """Unknown keys are errors, instances do not change after validation, and `name: 7` is the text 7."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, coerce_numbers_to_str=True)
