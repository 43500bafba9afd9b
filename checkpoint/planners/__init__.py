"""DCP's planners: what of a state dict is saved by whom, and what a load needs."""
