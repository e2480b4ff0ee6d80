"""What the new family shows: readings of pictures, and the tables and decisions made of them. See ../PLAN.md."""
