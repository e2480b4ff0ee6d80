"""A merge from text to plan: the text becomes a typed graph; with headers, a plan."""
