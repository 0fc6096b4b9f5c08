"""Scripts that print the tables that the README quotes, and write the JSON that they were read from."""
