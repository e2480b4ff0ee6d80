"""Bring stored bytes to the arithmetic, and decide which pages stay in memory.

`values.ValueReader` gives a thread the elements of windows, by windows on a mapping or by reads into its own buffers; `uploader.Uploader` brings bytes to
a device; `read_ahead.ReadAhead` has files in the page cache before they are asked for. Each says of bytes that they are no longer needed
(`InputFile.release`), and what was in the page cache before the run is all that stays there.
"""
