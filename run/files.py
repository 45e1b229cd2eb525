"""Files of tensors: adapters, saved caches, and the states that a training run goes on from. Nothing is pickled.

    adapter.safetensors + adapter.json   the compressor's weights, fp32; its configuration, base model, how it was made
    FILE.safetensors                     a compressed cache; what it belongs to stands in the header
    OUT/state/00000050.safetensors       after 50 steps: what is trained, AdamW's moments, a hash of it all
"""
import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from model import Cache, Llama, Part
from run.errors import BadInput, expect, parse_json, read_json, reading, write_atomic, write_json

ROOT = Path(__file__).resolve().parent.parent


ROWS = 4  # of each weight, in its fingerprint


def base_of(model: Llama, tokenizer) -> dict:
    """What an adapter or a saved cache is bound to: architecture, tokenizer and (a warning only) weights, of which the
    first few rows of every tensor count. Where these are spread over processes, all have to take part the first time:
    the first rows lie in the first process."""
    if model.fingerprint is None:
        h, spread = hashlib.sha256(), False
        for name, w in sorted(model.named_parameters()):
            spread |= isinstance(w, DTensor)
            rows = (w.to_local() if isinstance(w, DTensor) else w)[:ROWS].to("cpu", torch.bfloat16)  # equal in fp32
            h.update(name.encode() + rows.contiguous().view(torch.uint8).numpy().tobytes())
        found = [h.hexdigest()]
        if spread:
            dist.broadcast_object_list(found)
        model.fingerprint, = found
    # a Llama, as adapters from before these take it
    plain = {"bias": "", "head_norm": False, "sliding_window": None, "sliding_layers": ()}
    architecture = {key: x for key, x in asdict(model.cfg).items() if key not in plain or x != plain[key]}
    return {"architecture": architecture, "tokenizer": tokenizer.fingerprint, "weights": model.fingerprint}


def check_base(path, found: dict, model: Llama, tokenizer) -> None:
    want = base_of(model, tokenizer)
    have, need = found.get("architecture"), want["architecture"]
    have = have if isinstance(have, dict) else {}
    for key in need | have:
        if have.get(key) != need.get(key):
            raise BadInput(f"{path}: made for a model with {key} = {have.get(key)}, this one has {need.get(key)}; "
                           "pass the --weights it was made with")
    if found.get("tokenizer") != want["tokenizer"]:
        raise BadInput(f"{path}: made with another tokenizer; pass the --weights it was made with")
    if found.get("weights") != want["weights"]:
        print(f"warning: {path} was made with other weights of this architecture: expect less", file=sys.stderr)


def save_adapter(folder, comp, model: Llama, tokenizer, about: dict) -> None:
    """adapter.safetensors (fp32) and, last, adapter.json: configuration, base model, `about` (how it was trained)."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in comp.state_dict().items()}
    write_atomic(Path(folder) / "adapter.safetensors", lambda tmp: save_file(tensors, tmp))
    write_json(Path(folder) / "adapter.json", {"config": asdict(comp.cfg), "base": base_of(model, tokenizer),
                                               "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **about})


def read_about(path) -> dict:
    """adapter.json: configuration, base model, how it was made."""
    meta = read_json(path)
    with reading(path):
        for key, kind in (("config", dict), ("base", dict), ("train", dict), ("created", str)):
            expect(meta.get(key, kind()), kind)
    return meta


def read_adapter(folder, model: Llama, tokenizer) -> tuple[dict, dict[str, torch.Tensor]]:
    """adapter.json and the tensors of an adapter made for this model. Errors: BadInput for a missing, damaged or
    foreign one, or one with a number that is not finite."""
    folder = Path(folder)
    meta = read_about(folder / "adapter.json")
    check_base(folder / "adapter.json", meta.get("base", {}), model, tokenizer)
    if meta.get("system") != tokenizer.system:
        print(f"warning: {folder} was trained with --system {meta.get('system')!r:.50}: expect less", file=sys.stderr)
    with reading(folder / "adapter.safetensors"):
        with safe_open(folder / "adapter.safetensors", "pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        for name, x in tensors.items():
            if x.dtype != torch.float32 or not x.isfinite().all():
                raise ValueError(f"{name} is {x.dtype}, or not finite; expected finite fp32 numbers")
    return meta, tensors


def default_adapter(model: Llama, tokenizer) -> Path | None:
    """For this architecture and tokenizer: the one trained here last (out/*/adapter), else the shipped one (adapters/*)
    that was trained longest."""
    want, found = base_of(model, tokenizer), []
    for path in (*ROOT.glob("adapters/*/adapter.json"), *ROOT.glob("out/*/adapter/adapter.json")):
        try:
            meta = read_about(path)
        except BadInput as e:
            print(f"warning: {e}; it is passed over", file=sys.stderr)
            continue
        if all(meta.get("base", {}).get(key) == want[key] for key in ("architecture", "tokenizer")):
            here = path.parent.name == "adapter"
            found.append((here, 0 if here else steps_of(meta), meta.get("created", ""), path.parent))
    return max(found)[-1] if found else None


def steps_of(meta) -> int:
    """How many steps made the adapter of this adapter.json, those of the adapter that it went on from included."""
    if not isinstance(meta, dict) or not isinstance(train := meta.get("train"), dict):
        return 0
    return sum(train[x] for x in ("reconstruct", "steps") if type(train.get(x)) is int) + steps_of(meta.get("from"))


CACHE_KEY, CACHE_FORMAT = "kvdistill_cache", 2  # in the header of the safetensors file; 1 held no ragged caches


def save_cache(path, cache: Cache, model: Llama, tokenizer) -> None:
    """One safetensors file: next_position, and LAYER.PART.k, .v, .positions and perhaps .bias as in model.Part; what
    it belongs to stands in the header."""
    tensors = {f"{i}.{j}.{name}": x for i, parts in enumerate(cache.layers) for j, part in enumerate(parts)
               for name, x in vars(part).items() if x is not None} | {"next_position": cache.next_position}
    header = {CACHE_KEY: json.dumps({"format": CACHE_FORMAT, "base": base_of(model, tokenizer)})}
    # contiguous copies: parts may share memory, which the format does not allow
    tensors = {k: x.cpu().clone(memory_format=torch.contiguous_format) for k, x in tensors.items()}
    write_atomic(path, lambda tmp: save_file(tensors, tmp, metadata=header))


def cache_header(path) -> dict:
    """What a saved cache belongs to. Errors: BadInput for a file that is none."""
    with reading(path, "write it again with --save"), safe_open(path, "pt") as f:
        header = parse_json((f.metadata() or {}).get(CACHE_KEY, "no saved cache"))
        if header.get("format") != CACHE_FORMAT:
            raise ValueError(f"a cache of format {header.get('format', 1)}, expected {CACHE_FORMAT}")
        expect(header["base"], dict)
    return header


def load_cache(path, model: Llama, tokenizer) -> Cache:
    """A saved cache, on the model's device. Errors: BadInput for a missing, truncated, foreign or misshapen file."""
    check_base(path, cache_header(path)["base"], model, tokenizer)
    c, layers, dtypes = model.cfg, [], set()

    def need(ok, what):
        if not ok:
            raise ValueError(what)
    with reading(path, "write it again with --save"), safe_open(path, "pt", device=str(model.device)) as f:
        left = set(f.keys())

        def take(name, dtype, *shape):  # None: any size; no more is read than the header was found to say
            left.remove(name)
            have = f.get_slice(name).get_shape()
            need(len(have) == len(shape) and all(w in (None, n) for n, w in zip(have, shape)), f"{name} is {have}")
            x = f.get_tensor(name)
            need(x.dtype in dtype, f"{name} is {x.dtype}")
            need(not x.is_floating_point() or x.isfinite().all(), f"{name} is not finite")
            return x
        end = take("next_position", [torch.int64], None)
        B = len(end)
        need(B and 0 <= end.min() and end.max() <= c.max_positions, "next_position is not in the model's reach")
        for i in range(c.n_layer):
            parts, heads = [], 0
            while heads < c.n_kv_head:
                at = f"{i}.{len(parts)}."
                k = take(at + "k", [torch.float32, torch.bfloat16], B, None, None, c.head_dim)
                g, S = k.shape[1:3]
                v = take(at + "v", [k.dtype], B, g, S, c.head_dim)
                positions = take(at + "positions", [torch.int32], B, None, S)
                bias = take(at + "bias", [torch.float32], B, None, S) if at + "bias" in left else None
                per_head = {x.shape[1] for x in (positions, bias) if x is not None}
                need(g and per_head <= {1, g}, f"{at}k has {g} heads, its positions or biases not")
                need(((-1 <= positions) & (positions < end[:, None, None])).all(), f"{at}positions: not the text's")
                parts.append(Part(k.to(model.dtype), v.to(model.dtype), positions, bias))
                heads, dtypes = heads + g, dtypes | {k.dtype}
            need(heads == c.n_kv_head, f"layer {i} has {heads} heads")
            layers.append(parts)
        need(not left, f"{sorted(left)[:1]} does not belong there")
    if dtypes != {model.dtype}:
        print(f"note: {path} holds {', '.join(map(str, dtypes))}, the model runs in {model.dtype}: converted",
              file=sys.stderr)
    return Cache(layers, end)


# ------------------------------------------------------------------------------------------- states of a training run

KEPT = 2             # states; should the newest not read back, the one before it does
HEADER = "kvdistill_state"

def digest(tensors: dict[str, torch.Tensor], about: dict) -> str:
    """SHA-256 over header, names, dtypes, shapes, bytes: a file that was cut, or has a bit flipped, does not match."""
    h = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        h.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
        h.update(x.contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()


def save_state(out, step: int, module, optimizer, about: dict) -> Path:
    """Write the state after `step` steps; older ones go once this one has been read back.

    Args: module: what is trained; optimizer: AdamW over its parameters; about: JSON values for the header.
    Errors: BadInput if it cannot be written, or not be read back; the states before it are still there.
    """
    tensors = {f"trained.{name}": p.detach().cpu() for name, p in module.named_parameters()}
    for name, p in module.named_parameters():  # a parameter that had no gradient yet has no moments
        tensors |= {f"{key}.{name}": x.detach().cpu() for key, x in optimizer.state.get(p, {}).items()}
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    about = {"step": step, **about}
    header = {HEADER: json.dumps({**about, "sha256": digest(tensors, about)})}
    path = Path(out) / "state" / f"{step:08}.safetensors"
    write_atomic(path, lambda tmp: save_file(tensors, tmp, metadata=header))
    read_state(path)
    for old in state_files(out)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def state_files(out) -> list[Path]:
    """The states of a run, the newest first; a copy that somebody made by hand is none."""
    return sorted((Path(out) / "state").glob("[0-9]" * 8 + ".safetensors"), reverse=True)


def read_state(path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and header of one state file. Errors: BadInput for a file that is not what was written."""
    with reading(path, "is the disk sound?"):
        with safe_open(path, "pt") as f:
            header = parse_json((f.metadata() or {})[HEADER])
            tensors, sha256 = {name: f.get_tensor(name) for name in f.keys()}, header.pop("sha256")
        if digest(tensors, header) != sha256 or Path(path).stem != f"{expect(header['step'], int):08}":
            raise ValueError("its bytes are not those that were written")
    return tensors, header


def load_state(out, module, optimizer) -> dict | None:
    """Put the newest state that reads back into module and optimizer; its header, or None where there is no state.

    A damaged file is named on stderr and passed over; it is not touched here: see `set_aside`. Errors: BadInput when
    there are states and none can be read.
    """
    paths = state_files(out)
    for path in paths:
        try:
            tensors, header = read_state(path)
            with reading(path, "is it of another run?"):
                restore(tensors, module, optimizer)
        except BadInput as e:
            print(f"warning: {e}; going back to the one before it", file=sys.stderr)
            continue
        return header
    if paths:
        raise BadInput(f"{paths[0].parent}: none of {len(paths)} states can be read; delete {out} to start again")
    return None


@torch.no_grad()
def restore(tensors: dict[str, torch.Tensor], module, optimizer) -> None:
    optimizer.state.clear()
    for name, p in module.named_parameters():
        p.copy_(tensors[f"trained.{name}"].view(p.shape))
        moments = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                   if f"{key}.{name}" in tensors}
        if len(moments) == 3:  # AdamW counts steps on the CPU
            optimizer.state[p] = {key: x.view(()).clone() if key == "step" else x.view(p.shape).to(p.device, copy=True)
                                  for key, x in moments.items()}
        elif moments:
            raise ValueError(f"of the moments of {name}, it has {', '.join(moments)} alone")
