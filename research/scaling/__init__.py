"""From small runs to a large one: laws, their intervals, predictions."""
