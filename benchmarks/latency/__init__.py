"""What a round costs beyond training in the real topology: processes, TLS, node keys."""
