"""Other people's programs, fetched at fixed versions and run as the judges of what mergetool writes and reads.

``comfyui()`` and ``pip_target()`` say where a program's files lie and fetch them on first use; ``ComfyUI`` is the real ComfyUI in a process of its
own, which the session fixture ``comfyui`` of ``tests/conftest.py`` starts once for every worker of pytest. docs/explanation/oracles.md says what was run.
"""

from tests.oracles.fetching import OracleMissingError, comfyui, comfyui_packages, pip_target
from tests.oracles.process import ComfyUI, RefusedError, Worker

__all__ = ["ComfyUI", "OracleMissingError", "RefusedError", "Worker", "comfyui", "comfyui_packages", "pip_target"]
