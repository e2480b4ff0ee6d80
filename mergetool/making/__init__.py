"""From the outputs that a recipe file asks for to files: which of them are up to date, and the others in as few passes as possible."""
