"""NNCodec, the reference software of ISO/IEC 15938-17, as one call each way.

Its front imports a framework for training with a dozen packages of its own, which
neither coder nor quantizer uses. Where they are missing, empty modules stand for that
framework; what is measured, trellis and arithmetic coder, is NNCodec's compiled code.
"""

import importlib
import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FRAMEWORK = "nncodec.framework"
_PARTS = ("pytorch_model", "tensorflow_model", "use_case_init")


def installed() -> str:
    """Return the version that is installed; an empty string: none."""
    return version("nncodec") if importlib.util.find_spec("nncodec") else ""


def _codec() -> Any:
    """Return the module with ``compress`` and ``decompress``."""
    if "nncodec.nnc" not in sys.modules:
        framework = ModuleType(_FRAMEWORK)
        for part in _PARTS:
            setattr(framework, part, ModuleType(f"{_FRAMEWORK}.{part}"))
        sys.modules.setdefault(_FRAMEWORK, framework)
    return importlib.import_module("nncodec.nnc")


def encode(state: dict[str, Tensor], qp: int, scale: float = 0.0) -> bytes:
    """Return a state dict of float32 and int32 as one stream.

    Args:
        state: by name; vectors are coded at NNCodec's own fine step.
        qp: of the weights; 4 more are a step twice as large.
        scale: of the rate in the trellis; 0, NNCodec's default: distortion alone.
    """
    arrays = {
        name: np.array(tensor.numpy(), order="C") for name, tensor in state.items()
    }
    stream: bytes = bytes(
        _codec().compress(
            arrays,
            bitstream_path=None,
            qp=qp,
            lambda_scale=scale,
            row_skipping=True,
            return_bitstream=True,
        )
    )
    return stream


def decode(stream: bytes, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a stream.

    Args:
        stream: of ``encode``.
        like: of the same names and shapes.
    """
    found = _codec().decompress(bytearray(stream))
    return {
        name: torch.from_numpy(np.array(found[name])).reshape(t.shape).to(t.dtype)
        for name, t in like.items()
    }
