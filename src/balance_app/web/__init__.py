"""The operator's page: what runs where, what waits, users' balances, and buttons.

Everything is rendered on the server and works without scripts. A browser with scripts gets changes
over one event stream (`stream`), made once a second for all viewers of this instance, and not at
all without viewers. `view_models` formats labels and numbers, `charts` makes the SVG, `queries`
reads what the status of the jobs does not have, `actions` has the forms.

What a key may not do has no form and no button: rows of jobs are rendered with and without. That is
for people; whether a form may be sent is decided by the gate (`access`).

On failure the last known state stays on the page, with the reason and its age.
"""
