"""One file per metric family: pure functions over tables."""
