"""How a checkpoint appears under its name in one step, and what becomes of what was there before."""
