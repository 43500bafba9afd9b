"""One job on this node: its saves, generations, plans, files, retention, and the memory that its last commit leaves."""
