"""Make a recipe's outputs: skip those that are up to date, make the others in few passes."""
