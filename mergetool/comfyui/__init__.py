"""The commands as ComfyUI nodes. Files in, files out: no node holds a model, so a merge needs as little memory here as on the command line.

ComfyUI's Python needs mergetool installed; then give ComfyUI this folder, as a link or as a file of one line:

    ln -s .../site-packages/mergetool/comfyui ComfyUI/custom_nodes/mergetool-nodes

    ComfyUI/custom_nodes/mergetool_nodes.py:
    from mergetool.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

Nothing of ComfyUI is imported: what it offers is looked up when a node needs it (see ``host``).
"""

from .registry import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
