"""ckptd beside stock torch and beside the machine's own limits, in one run. Run it with ``make bench``."""
