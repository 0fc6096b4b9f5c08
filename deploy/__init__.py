"""Running a federation for real: certificates and keys, and its processes over TLS."""
