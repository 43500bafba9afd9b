"""Who writes what: local items, the global plan, and whether chunks tile their tensors."""
