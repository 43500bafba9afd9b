"""`load`: what is wanted against what is there, from where its bytes come, and what it did."""
