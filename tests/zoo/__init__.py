"""Models of many kinds and what a run must do with them."""
