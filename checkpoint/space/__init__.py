"""Room and quota on the volume of a checkpoint."""
