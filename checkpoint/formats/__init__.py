"""Other forms of a checkpoint: torch.save files, safetensors; conversion, comparison and extraction without a model."""
