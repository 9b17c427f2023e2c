"""Who may do what: keys, their scopes, and how often somebody may ask."""
