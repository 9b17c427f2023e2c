"""The operator's page: what runs where, what waits, who has how much, and buttons.

Everything is rendered on the server and works without scripts. Whoever has them gets what has
changed over one event stream (`stream`), made once a second for all who watch this instance, and
for nobody when nobody does. `view_models` has every word and number that is shown, `charts` the
SVG, `queries` what is read beside the status of the jobs, `actions` the forms.

On failure the last known state stays on the page, with the reason and its age.
"""
