"""What stock torch.distributed.checkpoint writes beside tensors: ``.metadata`` and records, without loading torch."""
