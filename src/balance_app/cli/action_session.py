"""What the command for actions does: it reads and shows them."""

from rich.text import Text

from balance_app.cli import output
from balance_app.cli.session import Session


class ActionSession(Session):
    """The use of a service's list of actions."""

    def actions(self, by: str | None, subject: str | None, before: int | None, limit: int) -> None:
        """Show actions, the latest first."""
        query = {"by": by, "subject": subject, "before": before, "limit": limit}
        answer = self._get("/api/actions", "actions", **query)
        found = answer.body["actions"]
        self._report(
            answer.text,
            lambda: (
                output.actions_table(found, answer.now, self._out)
                if found
                else Text("No actions match.")
            ),
        )
        if answer.body["next"] is not None:
            options = {**query, "before": answer.body["next"]}
            self._next_page("More", "actions", **options)
