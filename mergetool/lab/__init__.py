"""The embedded family: small trained Z-Image models of a closed world, so that every claim can be shown without a download.

Its pictures hold one shape of one colour on a ground of another (see world), which a checker reads off exactly (see
checker). Members are complete pipeline folders (see members); the scripts that trained them are in `training`.
"""
