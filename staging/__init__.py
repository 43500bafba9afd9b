"""Arenas, slots, pinning and copying; the byte order of a staged image."""
