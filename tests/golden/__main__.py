"""Write the golden files. Only for a new format version, or to add cases."""

import argparse
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch

from lc3 import ship
from lc3.codec import reference
from lc3.format import (
    FLAG_ENTROPY_CODED,
    HEADER_BYTES,
    Tag,
    max_frame_bytes,
    seal,
    seal_abort,
)
from lc3.plan import Piece
from lc3.wire.entropy import compress
from lc3.wire.message import pack

HERE = Path(__file__).parent
LENGTHS = (1, 2, 4, 5, 6, 11, 70, 71, 145, 350)
SPARSITIES = (1.0, 1.25, 1.5, 1.75, 1.9)


def inputs(n: int) -> dict[str, torch.Tensor]:
    """Return named inputs that do not depend on any random generator's version."""
    at = torch.arange(n, dtype=torch.float64)
    wave = ((at * 0.7548776662466927) % 1 - 0.5).float()  # exact in float64 for small n
    spike = torch.zeros(n)
    spike[-1:] = -2.5
    poisoned = wave.clone()
    poisoned[n // 2 : n // 2 + 1] = torch.inf
    return {
        "wave": wave,
        "peaks": wave**7,
        "spike": spike,
        "subnormal": (wave * 20).round() * 1e-45,
        "zero": torch.zeros(n),
        "infinite": poisoned,
    }


def frames() -> list[dict[str, object]]:
    cases = []
    for n in LENGTHS:
        for kind, x in inputs(n).items():
            for sparsity in (
                SPARSITIES[:1] if kind in ("zero", "infinite") else SPARSITIES
            ):
                residual, out = (
                    x.clone(),
                    torch.empty(max_frame_bytes(n), dtype=torch.uint8),
                )
                used, _ = reference.encode(residual, sparsity, out)
                cases.append(
                    {
                        "kind": kind,
                        "sparsity": sparsity,
                        "input": x.numpy().tobytes().hex(),
                        "frame": out[:used].numpy().tobytes().hex(),
                        "residual": residual.numpy().tobytes().hex(),
                    }
                )
    return cases


def messages() -> list[dict[str, object]]:
    cases: list[dict[str, object]] = []
    for tag in (Tag(0, 0, 0, 0), Tag(3, 2**40 + 7, 12, 0xDEADBEEF)):
        for body in ("", "0000803fb0", "000000410102030405ca"):
            message = torch.zeros(HEADER_BYTES + len(body) // 2, dtype=torch.uint8)
            message[HEADER_BYTES:] = torch.tensor(list(bytes.fromhex(body)))
            cases.append(
                {**as_dict(tag), "message": seal(message, tag).numpy().tobytes().hex()}
            )
        abort = seal_abort("disk full · Platte voll", tag)
        cases.append({**as_dict(tag), "abort": abort.numpy().tobytes().hex()})
    return cases


def entropy_coded_messages() -> list[dict[str, object]]:
    """Any version of zstd must read these bytes; none need write them."""
    tag = Tag(2, 9, 1, 0xCAFED00D)
    cases = []
    for raw_numel, n in ((0, 350), (100, 0), (25, 1400), (4000, 4000)):
        raw = (torch.arange(raw_numel) % 7).float().view(torch.uint8)
        out = torch.empty(max_frame_bytes(n), dtype=torch.uint8)
        used = reference.encode(inputs(n)["peaks"], 1.5, out)[0] if n else 0
        message, _ = compress(([raw], [out[:used]]), HEADER_BYTES)
        seal(message, tag, FLAG_ENTROPY_CODED)
        content = torch.cat([raw, out[:used]])
        cases.append(
            {
                **as_dict(tag),
                "message": message.numpy().tobytes().hex(),
                "content": content.numpy().tobytes().hex(),
            }
        )
    return cases


def range_coded_messages() -> list[dict[str, object]]:
    """Any version of lc3 must read these bytes; its models are its own affair."""
    tag = Tag(2, 9, 1, 0xCAFED00D)
    cases = []
    for raw_numel, n in ((0, 350), (100, 70), (25, 1400), (4000, 4000)):
        raw = (torch.arange(raw_numel) % 7).float().view(torch.uint8)
        out = torch.empty(max_frame_bytes(n), dtype=torch.uint8)
        used = reference.encode(inputs(n)["peaks"], 1.0, out)[0]
        both = [Piece("b", 0, raw_numel, 0, False), Piece("a", 0, n, 0, True)]
        both = [piece for piece in both if piece.numel]
        chunks = [raw, out[:used]][-len(both) :]
        message = pack(both, chunks, tag, "rans").message
        cases.append(
            {
                **as_dict(tag),
                "raw": raw_numel,
                "coded": n,
                "message": message.numpy().tobytes().hex(),
                "content": torch.cat(chunks).numpy().tobytes().hex(),
            }
        )
    return cases


def ship_state() -> dict[str, torch.Tensor]:
    """Return tensors that do not depend on any random generator's version."""
    wave = inputs(120)["wave"]
    return {
        "weight": wave.reshape(12, 10),
        "kernel": inputs(162)["wave"].reshape(6, 3, 3, 3).cumsum(-1),
        "bias": inputs(12)["peaks"] * 100,
        "half": wave[:60].reshape(6, 10).to(torch.bfloat16),
        "count": torch.tensor(70_000),
        "mask": wave[:20] > 0,
    }


def ship_base() -> dict[str, torch.Tensor]:
    """Return what the deltas among the cases are relative to."""
    return {
        name: tensor + 0.125 if tensor.is_floating_point() else tensor.clone()
        for name, tensor in ship_state().items()
    }


def shipped_models() -> list[dict[str, object]]:
    """Any version of lc3 must load these files; what it chooses is its own affair."""
    pruned = ship_state()["weight"] * (inputs(120)["wave"].reshape(12, 10) > 0.35)
    kinds: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
        "exact": (ship_state(), {}),
        "steps": (ship_state(), {"step": 0.05, "coder": "context"}),
        "zstd": (ship_state(), {"step": 0.05, "coder": "zstd"}),
        "dither": (
            ship_state(),
            {"step": 0.05, "coder": "context", "dither_seed": 2**64 - 3},
        ),
        "filter": (
            {"weight": pruned},
            {"step": 0.05, "coder": "context", "indices": "bloomier"},
        ),
        "exact delta": (ship_state(), {"base": ship_base()}),
        "coarse delta": (
            ship_state(),
            {"base": ship_base(), "step": 0.05, "coder": "context"},
        ),
    }
    return shipped(kinds)


def predicted_models() -> list[dict[str, object]]:
    """Return files of the predictive coder, which came later."""
    return shipped({"predictive": (ship_state(), {"step": 0.05})})


def shipped(
    kinds: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]],
) -> list[dict[str, object]]:
    """Return a case of each kind: what is shipped, and how."""
    cases: list[dict[str, object]] = []
    for name, (state, how) in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.lc3m"
            ship.save(state, path, **how)
            found = ship.load(path, base=how.get("base"))
            data = path.read_bytes()
        tensors = {
            key: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()
            for key, t in found.items()
        }
        case = {"name": name, "delta": "base" in how, "file": data.hex()}
        cases.append({**case, "tensors": tensors})
    return cases


def as_dict(tag: Tag) -> dict[str, object]:
    return {
        "sender": tag.sender,
        "step": tag.step,
        "bucket": tag.bucket,
        "plan": tag.plan,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    for name, cases in (
        ("frames", frames()),
        ("messages", messages()),
        ("entropy", entropy_coded_messages()),
        ("range", range_coded_messages()),
        ("ship", shipped_models()),
        ("predictive", predicted_models()),
    ):
        text = "".join(f" {json.dumps(case)},\n" for case in cases)[:-2]
        data = f"[\n{text}\n]\n"
        (HERE / f"{name}.json").write_text(data)
        print(
            f"{name}.json: {len(cases)} cases, CRC-32 {zlib.crc32(data.encode()):08x}"
        )
