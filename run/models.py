"""Open the model that a program's flags name: --weights, --device, --dtype."""
import argparse
import ctypes
import sys
import time
from functools import cache as once
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from run.errors import BadInput, expect, read_json, reading
from data.fetch import fetch
from data.tokenizer import Tokenizer
from model import KEYS, Config, Llama, load_llama, our_name, own_rows, rope_frequencies, weight_files


@once
def fastest_dtype() -> torch.dtype:
    """fp32 or bf16 on this CPU, whichever multiplies faster; a processor without bf16 units emulates it slowly."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        runs = []
        for _ in range(8):
            t = time.perf_counter()
            F.linear(a, b)
            runs.append(time.perf_counter() - t)
        seconds[dtype] = min(runs)
    best = min(seconds, key=seconds.get)
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    print(f"dtype: {str(best)[6:]} (here bf16 multiplies {ratio:.1f} x as fast as fp32)", flush=True)
    return best


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks. It would hand each back to the kernel and fault it in again, page by page,
    for every activation of every step: a step took 1.7 times as long on a virtual machine (LOG.md). Only on Linux."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: which is not given back


def add_model_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--weights", metavar="DIR", help="a Llama, Mistral or Qwen in the Hugging Face layout; "
                   "default: SmolLM2-135M-Instruct, fetched on first use")
    p.add_argument("--system", metavar="TEXT", help="system prompt; default: the one of the model's chat template")
    p.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu; the default), or a torch device")
    p.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
                   help="of the frozen model; auto (the default): what is fast on the device")


def model_name(weights: str | None) -> str:
    return "SmolLM2-135M-Instruct, Q4_1 dequantised" if weights is None else Path(weights).resolve().name


def seed_flag(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^32 - 1")
    return int(text)


def pick_device(name: str) -> torch.device:
    """The device that --device names. Errors: BadInput for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise BadInput(f"device {name!r} cannot be used ({str(e).splitlines()[0]}); try --device cpu") from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that --dtype names. auto is bf16 where the device has units for it, else fp32: fp16, all that a T4 or a
    V100 has besides, overflows in Llamas. Errors: BadInput for bf16 on such a GPU, which would emulate it slowly."""
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and not has_bf16:
        raise BadInput(f"--dtype bf16: {torch.cuda.get_device_name(device)} has no units for it; use --dtype fp32")
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    if device.type == "cpu":
        return fastest_dtype()
    return torch.bfloat16 if device.type == "cuda" and has_bf16 else torch.float32


def no_memory(error: RuntimeError) -> bool:
    return any(words in str(error) for words in ("out of memory", "t allocate memory"))


def read_config(path) -> Config:
    """Config.from_json for a file that strangers made: settings are of their types and of sizes that can be."""
    cfg = Config.from_json(path)
    with reading(path, "expected the config.json of a Llama, Mistral or Qwen"):
        scaling = cfg.rope_scaling or {}
        for name, x in (vars(cfg) | scaling).items():
            if name in ("rope_scaling", "rope_type", "bias", "head_norm", "sliding_layers") or (
                    name == "sliding_window" and x is None):
                continue
            most = 1000 if name == "n_layer" else 1 << 24
            if name == "tied":
                good, want = type(x) is bool, "true or false"
            elif name in ("norm_eps", "rope_theta", *scaling):
                good, want = type(x) in (int, float) and float(x) > 0, "a number above 0"
            else:
                good, want = type(x) is int and 0 < x <= most, f"a whole number from 1 to {most}"
            if not good:
                raise ValueError(f"{KEYS.get(name, name)} is {x!r:.50}, expected {want}")
        j = read_json(path)
        known = ("full_attention", "sliding_attention")[:2 if j.get("use_sliding_window") else 1]
        kinds = j.get("layer_types") if j["model_type"].startswith("qwen") else None  # nobody reads the others'
        if kinds is not None and (len(expect(kinds, list)) != cfg.n_layer or any(x not in known for x in kinds)):
            raise ValueError(f"layer_types is {kinds!r:.50}, expected {cfg.n_layer} times {' or '.join(known)}")
        if cfg.n_head % cfg.n_kv_head or cfg.head_dim % 2:
            raise ValueError(f"{cfg.n_head} heads, {cfg.n_kv_head} key-value heads of width {cfg.head_dim}: expected a "
                             "multiple, and an even width")
        if scaling.get("low_freq_factor", 0) >= scaling.get("high_freq_factor", 1):
            raise ValueError("rope_scaling has a low_freq_factor that is not below its high_freq_factor")
        if not rope_frequencies(cfg).isfinite().all():
            raise ValueError("rope_theta and rope_scaling give no finite frequencies")
    return cfg


def load_checked(folder, device="cpu", dtype=torch.float32, shard=None) -> Llama:
    """load_llama for a folder that strangers made: what the headers of its files hold is compared with config.json
    before memory is taken for it. Errors: BadInput for a missing, truncated or foreign file, a missing or surplus
    tensor, a wrong shape, a number that is not finite. Links in the folder are followed, wherever they lead."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder, expected one with config.json and model.safetensors")
    cfg, files = read_config(folder / "config.json"), weight_files(folder)
    if odd := [f for f in files if f.parent != folder]:
        raise BadInput(f"{folder}: its index names {odd[0]}, expected files of this folder; download it again")
    with reading(folder / "config.json"), torch.device("meta"):
        wanted = dict(Llama(cfg).named_parameters())
    found = {}
    for file in files:
        with reading(file, "download it again"), safe_open(file, "pt") as f:
            for key in f.keys():
                ours, header = our_name(key), f.get_slice(key)
                if key.endswith("rotary_emb.inv_freq") or cfg.tied and ours == "head.weight":
                    continue  # old files' rotary tables, a tied head stored twice
                if ours not in wanted or ours in found:
                    raise BadInput(f"{file}: {key} is none of the tensors of the model that config.json describes, or "
                                   "there twice; do they belong together?")
                if header.get_shape() != list(wanted[ours].shape):
                    raise BadInput(f"{file}: {key} is {header.get_shape()}, config.json says "
                                   f"{list(wanted[ours].shape)}")
                if not header.get_dtype().startswith(("F", "BF")):
                    raise BadInput(f"{file}: {key} holds numbers that are not floating-point; download it again")
                found[ours] = f"{file}: {key}"
    if missing := [x for x in wanted if x not in found]:
        raise BadInput(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}")
    model = load_llama(folder, device, dtype, shard)
    for name, w in model.named_parameters():
        rows, _ = own_rows(w)
        if rows.numel() and not torch.stack([rows.min(), rows.max()]).isfinite().all():  # either is NaN if one is
            raise BadInput(f"{found[name]} holds numbers that are not finite, or not in {dtype}; download it again")
    if cfg.sliding_layers:
        print(f"note: {folder}: a sliding window of {cfg.sliding_window} tokens in {len(cfg.sliding_layers)} of "
              f"{cfg.n_layer} layers; there, no token looks further back", file=sys.stderr)
    return model


def open_model(a: argparse.Namespace, shard=None):
    """The model and tokenizer that --weights, --system, --device and --dtype name; shard: see load_llama."""
    device, folder = pick_device(a.device), Path(a.weights or fetch())
    keep_freed_memory()
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder, expected one with config.json, model.safetensors and tokenizer.json")
    tokenizer, ids = Tokenizer(folder, a.system), read_config(folder / "config.json").vocab_size
    if tokenizer.n_vocab > ids:
        raise BadInput(f"{folder}: the tokenizer has {tokenizer.n_vocab} ids, the model {ids}; they do not belong "
                       "together")
    try:
        model = load_checked(folder, device, pick_dtype(a.dtype, device), shard)
    except RuntimeError as e:
        if not no_memory(e):
            raise
        raise BadInput(f"{folder}: the model does not fit into {device} ({str(e).splitlines()[0]}); try --dtype bf16, "
                       "or another --device. Only train.py spreads a model over GPUs (--parallel fsdp)") from None
    return model, tokenizer
