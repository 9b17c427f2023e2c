"""What a job's function takes beside its run, checked against its type hints."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NotRequired, cast

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from balance_app.jobs.stored_json import as_json

ARGS_BYTES: Final = 8192


class ArgumentsError(ValueError):
    """Arguments that a function can't be called with; the message names each and what it must be.

    Attributes:
        names: of the arguments that are wrong.
    """

    def __init__(self, sentence: str, names: list[str]) -> None:
        super().__init__(sentence)
        self.names: Final = names


class Parameters:
    """The parameters of a function behind the first, which is its run.

    Raises:
        TypeError: they can't be passed by name, or their hints are of no type that JSON can hold.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        hints: dict[str, Any] = {}
        extra: Literal["allow", "forbid"] = "forbid"
        for parameter in _behind_the_first(function):
            if parameter.kind is parameter.VAR_KEYWORD:
                extra = "allow"
            elif parameter.kind is parameter.POSITIONAL_ONLY:
                raise TypeError(f"{parameter.name} can't be passed by name")
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                known = parameter.annotation is not parameter.empty
                hint = parameter.annotation if known else Any
                optional = parameter.default is not parameter.empty
                hints[parameter.name] = NotRequired[hint] if optional else hint
        self._adapter: TypeAdapter[dict[str, Any]] | None = None
        if not hints and extra == "forbid":
            return  # most jobs take nothing but their run: there is no schema to build
        declared = cast("Any", TypedDict)("declared", hints)
        declared.__pydantic_config__ = ConfigDict(extra=extra, strict=True)
        try:
            self._adapter = TypeAdapter(declared)
        except PydanticUserError as error:
            raise TypeError(str(error).partition("\n")[0]) from None

    def check(self, args: Mapping[str, object]) -> dict[str, Any]:
        """Return what to call the function with: what JSON has as text may be a date, and so on.

        Raises:
            ArgumentsError: not JSON, too long, unknown, missing, or of another type.
        """
        text = encode(args)
        if self._adapter is None:
            if args:
                names = list(args)
                raise ArgumentsError(f"it takes no arguments, so not {', '.join(names)}", names)
            return {}
        try:
            return self._adapter.validate_json(text)
        except ValidationError as error:
            faults = error.errors(include_url=False)
            names = list(dict.fromkeys(str(fault["loc"][0]) for fault in faults))
            sentences = (
                f"{'.'.join(str(part) for part in fault['loc'])}: {_sentence(fault)}"
                for fault in faults
            )
            raise ArgumentsError("; ".join(sentences), names) from None


def encode(args: Mapping[str, object]) -> str:
    """Return arguments as JSON that PostgreSQL can hold.

    Raises:
        ArgumentsError: there is none, or more than 8 KiB of it.
    """
    try:
        text = as_json(dict(args))
    except (ValueError, TypeError) as error:
        raise ArgumentsError(f"they must be JSON: {error}", list(map(str, args))) from None
    size = len(text.encode())
    if size > ARGS_BYTES or "\\u0000" in text:
        raise ArgumentsError(
            f"they have at most {ARGS_BYTES} bytes of JSON and no NUL, and not {size} bytes",
            list(map(str, args)),
        )
    return text


def _behind_the_first(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except ValueError:  # of a function that is not written in Python
        raise TypeError("it has no signature") from None
    # The hint of the run may name what is imported for type checkers alone.
    if any(isinstance(each.annotation, str) for each in parameters):
        try:
            parameters = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        except Exception as error:
            raise TypeError(f"its type hints can't be read: {error!r}") from error
    return parameters


def _sentence(fault: Any) -> str:  # noqa: ANN401 - what pydantic found
    match fault["type"]:
        case "extra_forbidden":
            return "it has no such parameter"
        case "missing":
            return "it is missing"
    message: str = fault["msg"]
    return message[0].lower() + message[1:]
