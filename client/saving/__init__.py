"""`async_save` and `save`: a state dict is looked at, staged into a slot, sealed and followed to its end."""
