"""Folders of checkpoints: which are there, which are kept, pinned, being read, removed or found damaged."""
