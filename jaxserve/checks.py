"""Checks of a caller's values against their bounds; messages have OpenAI's wording and codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxserve.errors import ParameterError

MAX_CACHE_SALT_CHARS = 256


def check_cache_salt(salt: object) -> None:
    """Raises ParameterError unless `salt` is a string of 1 to 256 characters, or None for no salt."""
    if salt is None:
        return
    if not isinstance(salt, str):
        raise ParameterError(
            f"Invalid 'cache_salt': expected a string, got {type(salt).__name__}.",
            param="cache_salt",
            code="invalid_type",
        )
    if not salt or any("\ud800" <= char <= "\udfff" for char in salt):
        raise ParameterError(
            "Invalid 'cache_salt': expected a non-empty string of Unicode characters. Leave it out for no salt.",
            param="cache_salt",
        )
    if len(salt) > MAX_CACHE_SALT_CHARS:
        raise ParameterError(
            f"Invalid 'cache_salt': string too long. Expected a string with maximum length {MAX_CACHE_SALT_CHARS}, "
            f"but got a string with length {len(salt)} instead.",
            param="cache_salt",
            code="string_above_max_length",
        )


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raises ParameterError unless `value` is a finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ParameterError(
            f"Invalid '{name}': expected a finite number, got {value!r}.", param=name, code="invalid_type"
        )
    if value < low:
        raise ParameterError(
            f"Invalid '{name}': decimal below minimum value. Expected a value >= {low:g}, but got {value:g} instead.",
            param=name,
            code="decimal_below_min_value",
        )
    if value > high:
        raise ParameterError(
            f"Invalid '{name}': decimal above maximum value. Expected a value <= {high:g}, but got {value:g} instead.",
            param=name,
            code="decimal_above_max_value",
        )


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raises ParameterError unless `value` is an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ParameterError(f"Invalid '{name}': expected an integer, got {value!r}.", param=name, code="invalid_type")
    if value < low:
        raise ParameterError(
            f"Invalid '{name}': integer below minimum value. Expected a value >= {low}, but got {value} instead.",
            param=name,
            code="integer_below_min_value",
        )
    if value > high:
        raise ParameterError(
            f"Invalid '{name}': integer above maximum value. Expected a value <= {high}, but got {value} instead.",
            param=name,
            code="integer_above_max_value",
        )


def check_length(name: str, value: Sequence | Mapping, high: int) -> None:
    """Raises ParameterError if `value` has more than `high` items."""
    if len(value) > high:
        raise ParameterError(
            f"Invalid '{name}': array too long. Expected an array with maximum length {high}, but got an array "
            f"with length {len(value)} instead.",
            param=name,
            code="array_above_max_length",
        )
