"""Two models before they are merged: how far apart, in which direction, by which multiplier, and whether they belong together."""
