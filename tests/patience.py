"""How long a test waits for what has to come: so long that only a hang is told, on a machine of any speed and under any load."""

HANG = 900
"""Seconds. No test asserts that something is fast; what has a limit is counted in calls, bytes or elements."""
