"""What a checkpoint is: items, plans, layout, index, formats, commit and storage."""
