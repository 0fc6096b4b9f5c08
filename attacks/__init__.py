"""Attacks that measure which of a client's images the server can reconstruct from each kind of message.

`messages` defines what the server sees and knows; each attack is one file; `metrics` compares reconstructions with the
client's images; `evaluate` runs all attacks on all messages. The package never imports `server`.
"""
