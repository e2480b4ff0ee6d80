"""The process that the real ComfyUI server runs in: ``python -m tests.comfyui.serve ROOT ARGUMENTS...`` with ComfyUI's own arguments.

ComfyUI's ``main.py`` as a user starts it, beside the packages of the test environment: torchvision, torchaudio, av and three more, which it
imports for other nodes only, are stand-ins. ``tests.comfyui.pack`` is loaded by it as a custom node.
"""

from __future__ import annotations

import runpy
import sys

from tests.oracles import library

# For pictures and shaders: their nodes are in the menu and do not run.
library.Stubs.NAMES += ("comfy_angle", "kornia", "spandrel")

if __name__ == "__main__":
    root, *arguments = sys.argv[1:]
    sys.meta_path.insert(0, library.Stubs())
    sys.path.insert(0, root)  # "tests" of this repository is imported by now
    sys.argv = [f"{root}/main.py", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
