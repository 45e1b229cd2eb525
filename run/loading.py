"""Open the model and the tokenizer that the flags of a program name."""
import argparse
import ctypes
import os
import sys
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open

from data.fetch import fetch
from data.tokenizer import Tokenizer
from model import (
    CONFIG_NAMES, Config, Llama, hf_to_ours, load_llama, local_shard, rope_frequencies,
    weight_files)
from run.errors import BadInput, expect, read_json, reading
from run.flags import check_weights_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_name(weights: str | None) -> str:
    if weights is None:
        return "SmolLM2-135M-Instruct, Q4_1 dequantised"
    return Path(weights).resolve().name


# ------------------------------------------------------------- device and dtype

def pick_device(name: str) -> torch.device:
    """The device that --device names. Errors: BadInput if it is not there."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.empty(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what asks about "the" GPU means this one
        return device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise BadInput(f"device {name!r} cannot be used ({why}); try --device cpu") from None


def has_bf16_units(device: torch.device) -> bool:
    """Whether a CPU or GPU multiplies bf16 itself; others emulate it slowly.

    Of CPUs, these are x86 with AVX-512 BF16 or AMX, and ARM with BF16. Only
    Linux lists these features.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = Path("/proc/cpuinfo")
    if device.type != "cpu" or not features.exists():
        return False
    words = features.read_text().split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that --dtype names.

    auto is bf16 where the device has units for it, else fp32. It is never fp16,
    which a T4 or a V100 has units for, because Llamas overflow in it.
    Errors: BadInput for bf16 on a GPU without units for it.
    """
    if name == "auto":
        return torch.bfloat16 if has_bf16_units(device) else torch.float32
    if name == "bf16" and device.type == "cuda" and not has_bf16_units(device):
        gpu = torch.cuda.get_device_name(device)
        raise BadInput(f"--dtype bf16: {gpu} has no units for it; use --dtype fp32")
    return DTYPES[name]


def keep_freed_memory() -> None:
    """Ask glibc to keep large blocks that were freed.

    It would return them to the kernel and get them again, page by page, for
    every activation: a training step took 1.7 times as long on a virtual
    machine (notes/LOG.md). Only on Linux.
    """
    mallopt = None
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap; an old glibc takes 32 MiB
        mallopt(-3, 1 << 30) or mallopt(-3, 32 << 20)
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: the heap is not given back


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a CPU or a GPU had no memory left."""
    # "can't allocate memory", "cannot allocate memory"
    return any(words in str(error) for words in ("out of memory", "t allocate memory"))


# ------------------------------------------------------ files made by strangers

def read_config(path) -> Config:
    """Config.from_json for a file from a stranger: checks types and sizes."""
    check_weights_folder(Path(path).parent)
    read_json(path)  # refuses what is not an object with finite numbers
    with reading(path, "expected the config.json of a Llama, Mistral or Qwen"):
        cfg = Config.from_json(path)
        for field in fields(cfg):
            if field.type is int:
                size = expect(getattr(cfg, field.name), int)
                largest = 1000 if field.name == "n_layer" else 1 << 24
                if not 0 < size <= largest:
                    name = CONFIG_NAMES[field.name]
                    raise ValueError(f"{name} is {size}, expected a number from 1 to {largest}")
        for value in (cfg.norm_eps, cfg.rope_theta, *(cfg.rope_scaling or {}).values()):
            if expect(value, int, float) <= 0:
                raise ValueError(f"{value} where a number above 0 was expected")
        expect(cfg.tied, bool)

        if cfg.n_head % cfg.n_kv_head or cfg.head_dim % 2:
            raise ValueError(
                f"{cfg.n_head} heads, {cfg.n_kv_head} key-value heads of width {cfg.head_dim}: "
                "expected a multiple, and an even width")
        if not rope_frequencies(cfg).isfinite().all():
            raise ValueError("rope_theta and rope_scaling give no finite frequencies")
    return cfg


def check_weights(folder: Path, cfg: Config) -> None:
    """Compare the headers of weight files with config.json.

    These hold names, shapes and dtypes; no memory is taken for tensors. For use
    in `reading`.
    """
    with torch.device("meta"):
        wanted = {name: list(p.shape) for name, p in Llama(cfg).named_parameters()}

    for path in weight_files(folder):
        if path.parent != folder or not path.is_file():
            raise ValueError(f"its index names {path}, expected a file of this folder")
        with safe_open(path, "pt") as file:
            for key in file.keys():
                name = hf_to_ours(key)
                if key.endswith("rotary_emb.inv_freq") or cfg.tied and name == "head.weight":
                    continue  # tables in old files; a tied head that is stored twice
                if name not in wanted:
                    raise ValueError(
                        f"{path.name}: {key} is not in the model that config.json "
                        "describes, or is there twice")

                header = file.get_slice(key)
                shape = wanted.pop(name)
                if header.get_shape() != shape:
                    raise ValueError(
                        f"{path.name}: {key} is {header.get_shape()}, config.json says {shape}")
                if header.get_dtype() not in ("BF16", "F16", "F32", "F64"):
                    raise ValueError(
                        f"{path.name}: {key} is {header.get_dtype()}, not floating-point")
    if wanted:
        raise ValueError(f"{len(wanted)} tensors are missing, the first is {next(iter(wanted))}")


def load_checked(folder, device="cpu", dtype=torch.float32, shard=None) -> Llama:
    """load_llama for a folder from a stranger. Links in it are followed.

    Errors: BadInput for a missing, truncated or foreign file, a missing or
    surplus tensor, a wrong shape, or a number that is not finite.
    """
    folder = Path(folder)
    cfg = read_config(folder / "config.json")
    with reading(folder, "download it again"):
        check_weights(folder, cfg)

    model = load_llama(folder, device, dtype, shard)
    for name, weight in model.named_parameters():
        rows, _ = local_shard(weight)
        # The smallest and the largest number are NaN if any number is.
        if rows.numel() and not torch.stack(rows.aminmax()).isfinite().all():
            raise BadInput(
                f"{folder}: {name} holds numbers that are not finite, or not in {dtype}; "
                "download it again")
    warn_of_contradictions(folder, model)
    return model


def warn_of_contradictions(folder: Path, model: Llama) -> None:
    """Say on stderr, once, what a model's files say twice and differently."""
    if os.environ.get("RANK", "0") != "0":
        return  # one of torchrun's other processes
    path = folder / "config.json"
    raw = read_json(path)
    with reading(path):
        ropes = [raw] + [raw.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
        thetas = {rope["rope_theta"] for rope in ropes if rope.get("rope_theta")}
        for theta in thetas:
            expect(theta, int, float)
    used = model.cfg.rope_theta
    if thetas - {used}:
        print(
            f"warning: {path}: rope_theta is {' and '.join(map(str, sorted(thetas)))}; {used} "
            "is used, as in transformers 5", file=sys.stderr)

    if not model.cfg.tied:
        return
    embedding, _ = local_shard(model.embed.weight)
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            if "lm_head.weight" in tensors.keys():
                head = tensors.get_slice("lm_head.weight")[:len(embedding)]
                if not torch.equal(head.to(embedding), embedding):
                    print(
                        f"warning: {file}: lm_head.weight is not the embedding matrix, and is "
                        f"not used, because {path} says tie_word_embeddings; transformers 5 "
                        "uses it: set tie_word_embeddings to false for that", file=sys.stderr)


def open_tokenizer(flags: argparse.Namespace) -> tuple[Tokenizer, Config]:
    """The tokenizer and the Config of --weights and --system, without the weights."""
    folder = Path(flags.weights or fetch())
    cfg = read_config(folder / "config.json")
    tokenizer = Tokenizer(folder, flags.system)
    if tokenizer.n_vocab > cfg.vocab_size:
        raise BadInput(
            f"{folder}: the tokenizer has {tokenizer.n_vocab} ids, the model {cfg.vocab_size}; "
            "they do not belong together")
    return tokenizer, cfg


def open_model(
    flags: argparse.Namespace, shard=None, tokenizer: Tokenizer | None = None,
) -> tuple[Llama, Tokenizer]:
    """The model and the tokenizer of --weights, --system, --device and --dtype.

    shard: see model.load_llama. tokenizer: that of open_tokenizer, if it was called.
    """
    device = pick_device(flags.device)
    dtype = pick_dtype(flags.dtype, device)
    folder = Path(flags.weights or fetch())
    keep_freed_memory()

    if tokenizer is None:
        tokenizer, _ = open_tokenizer(flags)
    try:
        model = load_checked(folder, device, dtype, shard)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise BadInput(
            f"{folder}: the model does not fit into {device} ({str(error).splitlines()[0]}); try "
            "--dtype bf16, or another --device. Only train.py spreads a model over GPUs "
            "(--parallel fsdp)") from None
    return model, tokenizer
