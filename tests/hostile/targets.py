"""What bytes of a stranger may do to each reader: give a value that keeps the reader's promise, or a MergetoolError in one sentence.

Every target takes a ``Choose``, which gives bytes and numbers: atheris draws them where coverage grows, hypothesis where its strategies
lead. It returns what is wrong with the verdict, None when nothing is. Anything else than MergetoolError that a reader raises goes through.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

from mergetool.checkpoint import strict_json
from mergetool.checkpoint.gguf import MAGIC, GgufHeader
from mergetool.checkpoint.reader import Checkpoint
from mergetool.checkpoint.shards import ShardIndex
from mergetool.errors import MergetoolError
from tests.checkpoint.header_mutants import by_library, by_us, meant

LONGEST_SENTENCE = 4000


class Choose(Protocol):
    """Where the fuzzer's choices come from."""

    def number(self, most: int) -> int:
        """A number from 0 to ``most``."""

    def text(self, most: int) -> str:
        """At most so many characters."""

    def rest(self) -> bytes:
        """All bytes that are left."""


Target = Callable[[Choose, Path], str | None]


def sentence_fault(error: MergetoolError) -> str | None:
    """What is wrong with an error's text: more than one line, or so long that it repeats its input."""
    text = str(error)
    if "\n" in text or not text.endswith((".", "?")):
        return f"not one sentence: {text[:200]!r}"
    return f"a sentence of {len(text)} characters" if len(text) > LONGEST_SENTENCE else None


def refused(read: Callable[[], object]) -> tuple[bool, str | None]:
    """Whether ``read`` refused its input, and what is wrong with how it said so."""
    try:
        read()
    except MergetoolError as error:
        return True, sentence_fault(error)
    return False, None


def header(choose: Choose, scratch: Path) -> str | None:
    """A safetensors header: the library's verdict, but for the differences that are meant."""
    text = choose.rest()
    cut = max(text.find(b"\xff\xff"), 0)  # what follows is data, so that the fuzzer can match the two
    raw = struct.pack("<Q", cut or len(text)) + (text[:cut] + text[cut + 2 :] if cut else text)
    return header_fault(raw)


def header_fault(raw: bytes) -> str | None:
    """What is wrong with our verdict on a whole file."""
    ours, theirs = by_us(raw), by_library(raw)
    if ours == theirs or (ours is None and meant(raw)):
        return None
    return (
        f"header {raw[:300]!r}: we {'read' if ours else 'refuse'} it, the library {'reads' if theirs else 'refuses'} it"
    )


NAME_PIECES = [
    *("a", "b", "C:", "/", "\\", ".", "..", "../", " ", "\0", "\n", "~", "%2e", "$HOME", "|", ":x", "CON", "nul", "com1", "¹", "é", "e\u0301"),
    *("\u202e", "\uff0e", ".safetensors", "//", "\\\\?\\", "file:", "\ud800", "a" * 300, ".index.json"),
]  # fmt: skip


def index(choose: Choose, scratch: Path) -> str | None:
    """A shard index, of any bytes or with names of suspicious pieces: what passes names plain files by pathlib's reading of both rules."""
    if choose.number(1):
        return index_fault(choose.rest())
    names = ["".join(_one_of(choose, NAME_PIECES) for _ in range(choose.number(4))) for _ in range(choose.number(3))]
    table = {f"w{i}": name + ".safetensors" * (choose.number(3) > 0) for i, name in enumerate(names)}
    return index_fault(json.dumps({"weight_map": table}).encode())


def index_fault(raw: bytes) -> str | None:
    """What is wrong with our verdict on an index."""
    found: list[ShardIndex] = []
    was_refused, fault = refused(lambda: found.append(ShardIndex.parse(raw, source="m.index.json")))
    if was_refused:
        return fault
    for name in found[0].shards:
        if not (PureWindowsPath(name).parts == PurePosixPath(name).parts == (name,)) or PureWindowsPath(name).drive:
            return f"the shard name {name!r} leads out of its folder"
        if not name.endswith(".safetensors") or not name.isprintable():
            return f"the shard name {name!r} is no name of a shard"
    return None


def expression(choose: Choose, scratch: Path) -> str | None:
    """A merge expression: what is read says the same again when its own text is read."""
    return expression_fault(choose.rest().decode("utf-8", "replace"))


def expression_fault(text: str) -> str | None:
    """What is wrong with how an expression was read."""
    from mergetool.recipe.expression import Expression, parse

    found: list[Expression] = []
    was_refused, fault = refused(lambda: found.append(parse(text)))
    if was_refused:
        return fault
    once = found[0]
    again = parse(once.render({}))
    if again.graph != once.graph:
        return f"{text[:200]!r} is {once.render({})[:200]!r}, which reads as {again.render({})[:200]!r}"
    return None if once.graph.degree() == 1 else f"{text[:200]!r} has degree {once.graph.degree()}"


LORA_HEADS = [
    "",
    "base_model.model.",
    "transformer.",
    "diffusion_model.",
    "lora_unet_",
    "lycoris_",
    "__import__.",
    "../",
]
LORA_MODULES = [
    *("layers.0.attention.to_q", "layers.1.attention.qkv", "layers_0_feed_forward_w1", "context_refiner.0.attention.to_out.0"),
    *("x_pad_token", "layers.0.attention_norm1", "down.0.conv", "os.system", "layers.99999999999999999999.attention.to_q", "."),
]  # fmt: skip
LORA_TAILS = [
    *(".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".alpha", ".dora_scale"),
    *(".diff", ".diff_b", ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2", ".lokr_w1", ".lokr_w2"),
    *(".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2", ".lora_A.default.weight", ".set_weight", ".oft_blocks", ""),
]  # fmt: skip
SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (1,),
    (4,),
    (2, 4),
    (4, 2),
    (4, 4),
    (2, 3),
    (2, 2, 1, 1),
    (1, 1, 1),
    (0, 4),
    (12, 2),
]
DTYPES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E8M0": 1}


def lora(choose: Choose, scratch: Path) -> str | None:
    """A LoRA file of pieces of all dialects: opened and described, or refused."""
    from mergetool.adapters.lora_file import open_lora

    head = LORA_HEADS[choose.number(len(LORA_HEADS) - 1)]
    names = []
    for _ in range(choose.number(7)):
        head = LORA_HEADS[choose.number(len(LORA_HEADS) - 1)] if choose.number(7) == 0 else head
        names.append(head + _one_of(choose, LORA_MODULES) + _one_of(choose, LORA_TAILS))
    metadata = {
        key: choose.text(60) if choose.number(3) else "[" * choose.number(9000)
        for key in ("lora_adapter_metadata", "software", "ss_network_module", "modelspec.implementation")
        if choose.number(5) == 0
    }
    path = _written(scratch, _drawn_tensors(choose, names), metadata)

    def read() -> None:
        with open_lora(path) as file:
            assert file.dialect
            for changes in file.changes.values():
                for change in changes:
                    assert change.adapter.tensors

    return refused(read)[1]


QUANT_MODULES = ["a", "model.diffusion_model.a", "layers.0.attention.qkv", ""]
QUANT_TAILS = [
    *(".weight", ".weight_scale", ".weight_scale_2", ".scale_weight", ".scale_input", ".input_scale", ".pre_quant_scale"),
    *(".comfy_quant", ".bias", "scaled_fp8", ".absmax", ".qweight", ".weight_codebook"),
]  # fmt: skip
MARKS = [
    *("{}", '{"format":"float8_e4m3fn"}', '{"format":"nvfp4"}', '{"format":"mxfp8"}', '{"format":"int8_tensorwise"}'),
    *('{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":16}', '{"format":["nvfp4"]}', '{"format":{}}', "[]", '"x"'),
    *('{"layers":{"a":"nvfp4"}}', '{"layers":{"a":{"format":"float8_e4m3fn"}}}', '{"layers":[]}', '{"layers":{"a":{"format":7}}}'),
    *('{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":1e30}', '{"layers":{"a":{"convrot_groupsize":-1}}}', "{"),
]  # fmt: skip


def quantisation(choose: Choose, scratch: Path) -> str | None:
    """Markers, scales and ``_quantization_metadata`` beside weights: an encoding whose rows fit the stored bytes, or a refusal."""
    from mergetool.quant.weights import quantised

    names = [_one_of(choose, QUANT_MODULES) + _one_of(choose, QUANT_TAILS) for _ in range(choose.number(6))]
    metadata = {"_quantization_metadata": _mark(choose)} if choose.number(2) == 0 else {}
    tensors = _drawn_tensors(choose, names)
    for name in tensors:
        if name.endswith("comfy_quant"):
            said = _mark(choose).encode("utf-8", "surrogatepass")
            tensors[name] = ("U8", (len(said),), said)
    path = _written(scratch, tensors, metadata)

    def read() -> None:
        with Checkpoint.open(path) as checkpoint:
            for encoding in quantised(checkpoint, "f").encodings.values():
                assert encoding.tensor in checkpoint.tensors
                values = encoding.values(checkpoint.read)
                assert values.size == encoding.rows * encoding.width

    return refused(read)[1]


def _mark(choose: Choose) -> str:
    return _one_of(choose, MARKS) if choose.number(3) else choose.text(80)


def gguf(choose: Choose, scratch: Path) -> str | None:
    """A GGUF header: tensors in order, apart and inside the file, or a refusal."""
    raw = MAGIC + choose.rest()
    found: list[GgufHeader] = []
    was_refused, fault = refused(
        lambda: found.append(GgufHeader.read(lambda at, size: raw[at : at + size], file_size=len(raw), source="m.gguf"))
    )
    if was_refused:
        return fault
    end = 0
    for name, info in found[0].tensors.items():
        if not end <= info.begin <= info.end <= len(raw) - found[0].data_start:
            return f"tensor {name!r} lies at {info.begin} to {info.end} of {len(raw) - found[0].data_start} bytes"
        end = info.end
    return None


def provenance(choose: Choose, scratch: Path) -> str | None:
    """The recipe in an output's metadata, which `verify` runs again."""
    text = choose.rest().decode("utf-8", "replace")
    recipe, _, inputs = text.partition("\x1e")
    return provenance_fault(recipe, inputs or "[]")


def provenance_fault(recipe: str, inputs: str) -> str | None:
    """What is wrong with how a record was read: a refusal that is no sentence, or fields that are not of their types."""
    from mergetool.recipe import provenance as recorded

    found: list[recorded.Recorded] = []
    metadata = {"mergetool.recipe": recipe, "mergetool.inputs": inputs}
    was_refused, fault = refused(lambda: found.append(recorded.read(metadata, "out")))
    if was_refused:
        return fault
    options = found[0].options
    texts = [*options.protect, *options.include, *options.exclude, *(pattern for pattern, _ in options.multipliers)]
    texts += [text for text in (options.keep_from, options.layout, options.quant, options.prefix) if text is not None]
    texts += [*found[0].fingerprints, *found[0].fingerprints.values(), found[0].expression]
    wrong = [text for text in texts if not isinstance(text, str)]
    return f"the record {recipe[:200]!r} {inputs[:200]!r} is read with {wrong[0]!r} for a text" if wrong else None


def names_file(choose: Choose, scratch: Path) -> str | None:
    """``mergetool.toml`` of the working folder, which may have come with a download."""
    from mergetool import models

    path = scratch / "mergetool.toml"
    path.write_bytes(choose.rest())
    return refused(lambda: models.names_in(path))[1]


def config(choose: Choose, scratch: Path) -> str | None:
    """``config.json`` and ``adapter_config.json``: strict JSON that Python's own reader reads as the same value, or a refusal."""
    raw = choose.rest()
    try:
        value = strict_json.loads(raw)
    except ValueError:
        return None
    same = json.loads(raw, parse_constant=_no_constant)
    return None if repr(same) == repr(value) or b"-0" in raw else f"{raw[:200]!r} reads as {value!r:.200}"


def _no_constant(word: str) -> None:
    raise AssertionError(f"{word} was let through, and is no JSON")


def _one_of(choose: Choose, of: list[str]) -> str:
    return of[choose.number(len(of) - 1)]


def _drawn_tensors(choose: Choose, names: list[str]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    tensors = {}
    for name in names:
        dtype, shape = list(DTYPES)[choose.number(len(DTYPES) - 1)], SHAPES[choose.number(len(SHAPES) - 1)]
        size = DTYPES[dtype]
        for length in shape:
            size *= length
        tensors[name] = (dtype, shape, bytes([choose.number(255)]) * size)
    return tensors


def _written(
    scratch: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], metadata: Mapping[str, str]
) -> Path:
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(table).encode()
    path = scratch / "fuzzed.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


TARGETS: dict[str, Target] = {
    "header": header,
    "index": index,
    "expression": expression,
    "lora": lora,
    "quantisation": quantisation,
    "gguf": gguf,
    "provenance": provenance,
    "names file": names_file,
    "config": config,
}
