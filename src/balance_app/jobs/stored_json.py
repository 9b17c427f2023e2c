"""JSON in the rows of jobs and runs: checkpoints and arguments."""

from pydantic_core import from_json, to_json


def as_json(value: object) -> str:
    """Return a value as JSON that can be read back.

    Raises:
        ValueError: it is not JSON, is too deep, or has a number that can't be read back.
    """
    encoded = to_json(value)
    from_json(encoded, allow_inf_nan=False)  # unreadable, it would fail every later run
    return encoded.decode()
