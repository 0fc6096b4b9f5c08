"""What an attacker at the server recovers of a client's images from each kind of message, measured.

`messages` says what the server sees and knows, one file per attack what it makes of that, `metrics` how near it came to
the client's own images, and `evaluate` runs them all against each other. The floor above `tofu` and beside `client`,
whose own training loop makes the updates under attack. It never imports `server`.
"""
