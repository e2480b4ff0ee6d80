"""The nodes by the names that workflows know them by. A name that was published stays."""

from __future__ import annotations

from mergetool.comfyui.arithmetic import Add, MergeExpression, Subtract
from mergetool.comfyui.comparing import Compare
from mergetool.comfyui.outputs import ExtractLora, Save
from mergetool.comfyui.sources import LoraFile, ModelFile, NamedModel

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "MergetoolModelFile": ModelFile,
    "MergetoolNamedModel": NamedModel,
    "MergetoolLoraFile": LoraFile,
    "MergetoolSubtract": Subtract,
    "MergetoolAdd": Add,
    "MergetoolExpression": MergeExpression,
    "MergetoolCompare": Compare,
    "MergetoolSave": Save,
    "MergetoolExtractLora": ExtractLora,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "MergetoolModelFile": "Model File (mergetool)",
    "MergetoolNamedModel": "Model by Name or Path (mergetool)",
    "MergetoolLoraFile": "LoRA File (mergetool)",
    "MergetoolSubtract": "Subtract Models (mergetool)",
    "MergetoolAdd": "Add Difference (mergetool)",
    "MergetoolExpression": "Merge by Expression (mergetool)",
    "MergetoolCompare": "Compare Models (mergetool)",
    "MergetoolSave": "Merge and Save (mergetool)",
    "MergetoolExtractLora": "Extract Difference LoRA (mergetool)",
}
