"""What an attacker at the server recovers of a client's images from each kind of message, measured.

`messages` defines what the server sees and knows; each attack is one file; `metrics` compares reconstructions with the
client's images; `evaluate` runs all attacks on all messages. The package imports `tofu` and
`client`, whose training loop makes the updates under attack, and never `server`.
"""
