"""From the text of a merge to a complete plan: expression (text to typed graph) and plan (graph and headers)."""
