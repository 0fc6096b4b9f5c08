"""Secure aggregation: the server learns the sum of the clients' vectors and nothing else of them.

Double masking of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, on
the sparse neighbor graph of Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020.
Each client hides its vector under a mask with each neighbor, which cancel in the sum, and under one of its own. Shares
of what is needed to take off either kind lie with the neighbors, who hand over one or the other and never both.

Bytes in, bytes out, in pure Python and numpy; `client.ClientSession` and `server.ServerSession` are the two ends, and
`fixed_point.FixedPoint` turns real vectors into theirs. Exchanges of a session, each one message either way:

    1  advert     fresh keys; travels with a reply of an earlier round, so it costs no exchange of its own
    2  share      roster down, sealed shares up
    3  mask       neighbors' sealed shares down, masked vector up
    4  confirm    survivors down, signature up; only in a run with identities
    5  reveal     survivors (and signatures) down, one share for each neighbor up

A client may drop out at any point. Its vector is in the sum if its masked vector came.

Guaranteed, with t the threshold, d neighbors each and t > d/2 + c (`graph.choose_topology`):

- A server that follows the protocol, together with up to c of any client's neighbors, learns the sum and its members,
  and of the other clients' vectors only what these say. So does anybody who records all messages.
- With identities and a complete graph, of a server that lies: that swaps keys, plays old messages again, tells clients
  different things, or says of a client who is there that it dropped out. It can spoil a session; what it can learn is
  one sum, of t - c honest clients or more. On a sparse graph, only that no vector is bare (`graph`). The public keys of
  the identities must have come to the clients by another way than through that server.

Not guaranteed:

- That the sum is right. A client may put any vector in, and no one can look: poisoning is easier to hide.
- That the sum says little. It says all about a client whose fellows' vectors are known, much where clients are few, and
  the sums of many rounds with changing members say more than each. Noise (differential privacy) is for that.
- Anything against many false clients that one party runs (sybils): who is known must be decided elsewhere.
- Without identities, anything against a server that lies about keys.
- That a session ends. A client that seals rubbish stops its neighbors; one that reveals a false share of a self-mask
  seed spoils the sum unseen.
- Who takes part, when, and how many examples all have together: that is in the open.
"""
