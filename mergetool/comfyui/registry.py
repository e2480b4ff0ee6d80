"""The nodes by the names that workflows know them by. A name that was published stays."""

from __future__ import annotations

from mergetool.comfyui.arithmetic import AddNode, MergeExpressionNode, SubtractNode
from mergetool.comfyui.comparison import CompareNode
from mergetool.comfyui.outputs import ExtractLoraNode, SaveNode
from mergetool.comfyui.sources import LoraFileNode, ModelFileNode, NamedModelNode

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "MergetoolModelFile": ModelFileNode,
    "MergetoolNamedModel": NamedModelNode,
    "MergetoolLoraFile": LoraFileNode,
    "MergetoolSubtract": SubtractNode,
    "MergetoolAdd": AddNode,
    "MergetoolExpression": MergeExpressionNode,
    "MergetoolCompare": CompareNode,
    "MergetoolSave": SaveNode,
    "MergetoolExtractLora": ExtractLoraNode,
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
