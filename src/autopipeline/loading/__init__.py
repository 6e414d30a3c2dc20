"""Reading checkpoints: the index, the Hub, the components."""
