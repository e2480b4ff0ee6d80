"""Train the members of the embedded family: ``python -m mergetool.lab.training``.

Every stage has a fixed seed and writes its member and a record of losses, time and machine. Nothing here is needed to
use the family.
"""
