"""The index of a checkpoint, as columns: its file ``.ckptd``, its rules, and how either kind of index is found."""
