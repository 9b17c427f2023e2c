"""Pages of lists: how many items one has, and the cursor of the page after it."""

from typing import Annotated, TypeVar

from pydantic import Field

from balance_app.http.body import MAX_INTEGER
from balance_app.http.params import DECIMAL

Item = TypeVar("Item")

Limit = Annotated[int, Field(ge=1, le=1000, description="maximum rows"), DECIMAL]
BeforeId = Annotated[
    int, Field(ge=1, le=MAX_INTEGER, description="the `next` of the previous page"), DECIMAL
]


def cut_page(found: list[Item], limit: int) -> tuple[list[Item], Item | None]:
    """Return the items of a page, and the last of them if more follow: it is the next cursor.

    `found` has one item more than the page, if there is one.
    """
    shown = found[:limit]
    return shown, shown[-1] if len(found) > limit else None
