"""What encoding one update costs and explains, for each kind of model."""
