"""Two models before a merge: their distance, direction, multiplier and lineage."""
