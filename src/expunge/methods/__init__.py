"""One file per unlearning objective."""
