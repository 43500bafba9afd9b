"""Byte ranges of a checkpoint's files into memory: merged, in parallel, verified."""
