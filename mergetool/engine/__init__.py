"""Run a plan: stream tensors through arithmetic in output order, with bounded memory."""
