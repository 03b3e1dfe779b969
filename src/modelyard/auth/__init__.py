"""Who may ask for anything at all. Deny by default, on the whole application: see `access`."""
