"""The embedded family: small trained Z-Image models, to show every claim without a download. They know a closed world.

Its pictures hold one shape of one colour on a ground of another (see world), which a checker reads off exactly (see
checker). Members are complete pipeline folders (see members); the scripts that trained them are in `training`.
"""
