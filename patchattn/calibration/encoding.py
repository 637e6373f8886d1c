"""The bytes of a calibration, its tensors and its manifest: strict, without pickle.

`calibration.safetensors` holds named tensors and, in its metadata, the manifest as one JSON string. Curves have one
entry per *rung*: "closed for every query", then one per margin of the grid, ascending, then "open for every query".
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from patchattn.calibration.files import damaged
from patchattn.calibration.key_moments import check_factors
from patchattn.calibration.manifest import Manifest
from patchattn.errors import CalibrationFormatError

SCHEMA_VERSION = 4

_MANIFEST = "manifest"
_OF_SCHEMA_1 = ("bulk_counts", "covariance_error")
_MOMENTS_OF_SCHEMA_1 = ("key_mean", "key_deviation", "key_factor")
_SINCE_SCHEMA_1 = {"moments": "prompt", "rotary": None, "moment_documents": 0}
_SHARES = frozenset(
    "missed_mass open_fraction recall precision known_fraction oracle_open_fraction priced_open_fraction "
    "kl_open_fraction tried".split()
)
_NEGATIVE_KL = 1e-4
"""Rounding makes the KL of nearly equal predictions this little negative, nats."""
_MOST_HEADER_BYTES = 1 << 20
_DTYPES = {"F16": torch.float16, "F32": torch.float32}


def expected_tensors(manifest: Manifest, n_margins: int, n_settings: int = 0) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name the tensors that go with a manifest: safetensors dtype and shape of each.

    Args:
        manifest: The manifest.
        n_margins: Number of margins on the grid.
        n_settings: Number of thresholds that were tried on held-out documents.
    """
    of, estimates, layers = manifest.fingerprint, len(manifest.estimates), len(manifest.layers)
    curves = (estimates, layers, of.query_heads, n_margins + 2)
    found = {
        "margins": ("F32", (n_margins,)),
        "missed_mass": ("F16", (2, *curves)),
        "open_fraction": ("F16", curves),
        "recall": ("F16", curves),
        "precision": ("F16", curves),
        "bias": ("F32", curves[:3]),
        "spread": ("F32", curves[:3]),
        "known_fraction": ("F32", curves[:3]),
        "oracle_open_fraction": ("F32", curves[1:3]),
    }
    if manifest.prices is not None:
        of_prices, heads = manifest.prices, (layers, of.query_heads)
        found["probe"] = ("F16", (*heads, of_prices.hidden))
        found["probe_offset"] = ("F32", heads)
        found["probe_scale"] = ("F32", heads)
        found["price"] = ("F32", (*heads, n_margins + 2))
        found["value"] = ("F32", (*heads, n_margins + 2))
        found["priced_open_fraction"] = ("F16", (*heads, n_margins + 2))
        found["tried"] = ("F32", (n_settings,))
        found["kl"] = ("F32", (of_prices.held_out, n_settings))
        found["kl_open_fraction"] = ("F16", (of_prices.held_out, n_settings))
    if manifest.rotary is not None:
        dim = of.head_dim
        found["key_mean"] = ("F32", (layers, of.kv_heads, dim))
        found["key_deviation"] = ("F32", (layers, of.kv_heads, dim))
        found["key_factor"] = ("F16", (layers, of.kv_heads, dim * (dim + 1) // 2))
        found["key_frequencies"] = ("F32", (layers, dim // 2))
    return found


def encode(manifest: Manifest, tensors: dict[str, Tensor]) -> bytes:
    """Return the bytes of `calibration.safetensors`; the same input gives the same bytes."""
    from safetensors.torch import save

    check(manifest, tensors)
    contiguous = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return save(contiguous, metadata={_MANIFEST: manifest.model_dump_json()})


def decode(data: bytes) -> tuple[Manifest, dict[str, Tensor]]:
    """Read the bytes of `calibration.safetensors` and check everything that can be checked without the model.

    Raises:
        CalibrationFormatError: Not such a file, damaged, of an unknown schema, or with numbers that can't be.
    """
    header, body = _split(data)
    metadata = header.pop("__metadata__", None)
    text = metadata.get(_MANIFEST) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise damaged("it has no manifest in its metadata")
    manifest, version = _manifest(text)
    tensors = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        tensors[name], end = _tensor(name, entry, body, end)
    if end != len(body):
        raise damaged(f"{len(body) - end} bytes after the last tensor")
    if version == 1:
        # They were of turned keys, for a few lengths; nothing uses those any more.
        tensors = {name: tensor for name, tensor in tensors.items() if name not in _MOMENTS_OF_SCHEMA_1}
    if version == 3 and manifest.prices is not None:
        tensors["probe_scale"] = torch.ones(len(manifest.layers), manifest.fingerprint.query_heads)
    check(manifest, tensors)
    return manifest, tensors


def check(manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Check names, dtypes, shapes and numbers of the tensors that go with a manifest.

    Raises:
        CalibrationFormatError: Says which tensor has what wrong.
    """
    margins = tensors.get("margins")
    if margins is None or margins.dim() != 1 or not len(margins):
        raise damaged("the tensor margins is missing or is not a list")
    tried = tensors.get("tried", torch.empty(0))
    expected = expected_tensors(manifest, len(margins), tried.numel())
    if set(tensors) != set(expected):
        missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise damaged(f"tensors missing: {missing}, not known: {extra}")
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if tensor.dtype != _DTYPES[dtype] or tuple(tensor.shape) != shape:
            raise damaged(f"{name} should be {dtype} {list(shape)}, is {tensor.dtype} {list(tensor.shape)}")
        if not tensor.isfinite().all():
            raise damaged(f"{name} has NaN or Inf")
    if (margins.diff() <= 0).any():
        raise damaged("margins do not ascend")
    for name in _SHARES & tensors.keys():
        if (tensors[name] < 0).any() or (tensors[name] > 1).any():
            raise damaged(f"{name} leaves [0, 1]")
    if (tensors["spread"] < 0).any():
        raise damaged("spread is negative")
    if (tensors.get("probe_scale", torch.ones(1)) <= 0).any():
        raise damaged("probe_scale is not positive")
    for name in ("missed_mass", "price", "value"):
        curve = tensors.get(name, torch.zeros(1)).float()
        if (curve.diff(dim=-1) > 0).any() or (curve[..., -1] != 0).any():
            raise damaged(f"{name} does not fall to zero along the margins")
    for name in ("open_fraction", "priced_open_fraction"):
        if (tensors.get(name, torch.zeros(1)).float().diff(dim=-1) < 0).any():
            raise damaged(f"{name} does not rise along the margins")
    if (tried.diff() > 0).any() or (tensors.get("kl", tried) < -_NEGATIVE_KL).any():
        raise damaged("what was tried does not fall, or a KL is negative")
    if manifest.rotary is not None:
        check_factors(tensors["key_deviation"], tensors["key_factor"], manifest.fingerprint.head_dim)


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    if len(data) < 8:
        raise damaged(f"it has {len(data)} bytes")
    (size,) = struct.unpack("<Q", data[:8])
    if size > _MOST_HEADER_BYTES:
        raise damaged(f"its header claims {size:,} bytes, so it is not a safetensors file or the header is oversized")
    if 8 + size > len(data):
        raise damaged(f"it is cut off: {len(data):,} bytes, the header alone needs {8 + size:,}")
    try:
        header = json.loads(data[8 : 8 + size].decode("utf-8"))
    except (ValueError, RecursionError):
        raise damaged("its header is not JSON") from None
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    return header, memoryview(data)[8 + size :]


def _begin(entry: Any) -> int:
    try:
        begin = entry["data_offsets"][0]
    except (TypeError, KeyError, IndexError):
        begin = None
    if type(begin) is not int:
        raise damaged("a tensor has no offsets")
    return begin


def _tensor(name: str, entry: dict[str, Any], body: memoryview, begin: int) -> tuple[Tensor, int]:
    """Read one tensor that must start where the one before ended."""
    shape, offsets = entry.get("shape"), entry["data_offsets"]
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
    if dtype is None:
        raise damaged(f"{name} has dtype {entry.get('dtype')!r}, expected one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**32 for n in shape):
        raise damaged(f"{name} has no proper shape")
    if len(shape) > 8 or not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise damaged(f"{name} has no proper shape or offsets")
    items = math.prod(shape)
    if offsets[0] != begin or offsets[1] - offsets[0] != items * dtype.itemsize:
        raise damaged(f"{name} has offsets {offsets} that do not fit its shape {shape}")
    if offsets[1] > len(body):
        raise damaged(f"it is cut off within {name}")
    if not items:
        return torch.empty(shape, dtype=dtype), offsets[1]
    tensor = torch.frombuffer(bytearray(body[offsets[0] : offsets[1]]), dtype=dtype)
    return tensor.reshape(shape), offsets[1]


def _manifest(text: str) -> tuple[Manifest, Any]:
    """Read a manifest of this schema or an earlier one, and tell which."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise damaged("its manifest is not JSON") from None
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if type(version) is int and not 1 <= version <= SCHEMA_VERSION:
        raise CalibrationFormatError(
            f"The calibration has schema version {version}; this version of patchattn reads 1 to {SCHEMA_VERSION}.",
            fix="upgrade patchattn",
        )
    if type(version) is int and version == 1:
        fields = {name: value for name, value in fields.items() if name not in _OF_SCHEMA_1} | _SINCE_SCHEMA_1
    if type(version) is int and version < 3:
        fields |= {"prices": None}
    if type(version) is int and version < SCHEMA_VERSION:
        text = json.dumps(fields | {"schema_version": SCHEMA_VERSION})
    return _validated(text), version


def _validated(text: str) -> Manifest:
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'manifest'}: {problem['msg']}" for problem in error.errors()
        )
        raise damaged(f"its manifest is not valid: {wrong}") from None
