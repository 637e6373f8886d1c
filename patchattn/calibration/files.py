"""Read and write the tensors and the manifest of a calibration: strict, atomic, without pickle.

`calibration.safetensors` holds named tensors and, in its metadata, the manifest as one JSON string. Curves have one
entry per *rung*: "closed for every query", then one per margin of the grid, ascending, then "open for every query".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from patchattn.calibration.manifest import Manifest
from patchattn.errors import CalibrationError, CalibrationFormatError, CalibrationNotFoundError
from patchattn.moments.text import RotaryMoments

FILE = "calibration.safetensors"
POLICY_FILE = "policy.json"
SCHEMA_VERSION = 2

_MANIFEST = "manifest"
_OF_SCHEMA_1 = ("bulk_counts", "covariance_error")
_SINCE_SCHEMA_1 = {"schema_version": 2, "moments": "prompt", "rotary": None, "moment_documents": 0}
_MOST_HEADER_BYTES = 1 << 20
_MOST_FILE_BYTES = 1 << 30
_DTYPES = {"F16": torch.float16, "F32": torch.float32}
_SPREAD_OF_ROUNDING = 2e-3


def expected_tensors(manifest: Manifest, n_margins: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name the tensors that go with a manifest: safetensors dtype and shape of each.

    Args:
        manifest: The manifest.
        n_margins: Number of margins on the grid.
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
        raise _damaged("it has no manifest in its metadata")
    manifest, dropped = _manifest(text)
    tensors = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        tensors[name], end = _tensor(name, entry, body, end)
    if end != len(body):
        raise _damaged(f"{len(body) - end} bytes after the last tensor")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    check(manifest, tensors)
    return manifest, tensors


def check(manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Check names, dtypes, shapes and numbers of the tensors that go with a manifest.

    Raises:
        CalibrationFormatError: Says which tensor has what wrong.
    """
    margins = tensors.get("margins")
    if margins is None or margins.dim() != 1 or not len(margins):
        raise _damaged("the tensor margins is missing or is not a list")
    expected = expected_tensors(manifest, len(margins))
    if set(tensors) != set(expected):
        missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise _damaged(f"tensors missing: {missing}, not known: {extra}")
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if tensor.dtype != _DTYPES[dtype] or tuple(tensor.shape) != shape:
            raise _damaged(f"{name} should be {dtype} {list(shape)}, is {tensor.dtype} {list(tensor.shape)}")
        if not tensor.isfinite().all():
            raise _damaged(f"{name} has NaN or Inf")
    if (margins.diff() <= 0).any():
        raise _damaged("margins do not ascend")
    for name in ("missed_mass", "open_fraction", "recall", "precision", "known_fraction", "oracle_open_fraction"):
        if (tensors[name] < 0).any() or (tensors[name] > 1).any():
            raise _damaged(f"{name} leaves [0, 1]")
    if (tensors["spread"] < 0).any():
        raise _damaged("spread is negative")
    missed, opened = tensors["missed_mass"].float(), tensors["open_fraction"].float()
    if (missed.diff(dim=-1) > 0).any() or (missed[..., -1] != 0).any():
        raise _damaged("missed_mass does not fall to zero along the margins")
    if (opened.diff(dim=-1) < 0).any():
        raise _damaged("open_fraction does not rise along the margins")
    if manifest.rotary is not None:
        _check_factors(tensors["key_deviation"], tensors["key_factor"], manifest.fingerprint.head_dim)


def pack_covariance(covariance: Tensor) -> tuple[Tensor, Tensor, float]:
    """Store covariances as deviations and the triangular factor of the correlations, in half precision.

    A product of a factor with itself can't lose positive semi-definiteness to rounding.

    Args:
        covariance: [..., dim, dim] float64.

    Returns:
        Deviations [..., dim] float32, factors [..., dim * (dim + 1) / 2] float16 by rows, and the largest relative
        error (Frobenius norm) of what `unpack_covariance` gives back.

    Raises:
        CalibrationFormatError: A covariance that is not finite, symmetric and positive semi-definite.
    """
    covariance = covariance.double()
    if not covariance.isfinite().all():
        raise _damaged("a covariance has NaN or Inf")
    scale = covariance.diagonal(dim1=-2, dim2=-1).abs().amax(-1)[..., None, None].clamp(min=1e-30)
    if ((covariance - covariance.mT).abs() > 1e-6 * scale).any():
        raise _damaged("a covariance is not symmetric")
    if (torch.linalg.eigvalsh(covariance / scale).amin(-1) < -1e-6).any():
        raise _damaged("a covariance is not positive semi-definite")
    deviation = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(deviation > 0, 1 / deviation.clamp(min=1e-150), 0)
    correlation = covariance * inverse[..., :, None] * inverse[..., None, :]
    eigenvalues, vectors = torch.linalg.eigh(correlation)
    # A root that is not triangular, made triangular: exact for singular matrices too, where Cholesky fails.
    root = vectors * eigenvalues.clamp(min=0).sqrt()[..., None, :]
    factor = torch.linalg.qr(root.mT).R.mT
    factor = factor * torch.where(factor.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]
    rows, columns = torch.tril_indices(covariance.shape[-1], covariance.shape[-1])
    packed, kept = factor[..., rows, columns].half(), deviation.float()
    back = unpack_covariance(kept, packed).double()
    size = covariance.flatten(-2).norm(dim=-1)
    error = (back - covariance).flatten(-2).norm(dim=-1) / size.clamp(min=1e-30)
    return kept, packed, float(torch.where(size > 0, error, 0).max())


def unpack_covariance(deviation: Tensor, factor: Tensor) -> Tensor:
    """Return covariances [..., dim, dim] float32 from what `pack_covariance` stored."""
    dim = deviation.shape[-1]
    rows, columns = torch.tril_indices(dim, dim)
    triangle = torch.zeros(*deviation.shape, dim)
    triangle[..., rows, columns] = factor.float()
    triangle = triangle * deviation[..., None]
    return triangle @ triangle.mT


def unpack_moments(tensors: dict[str, Tensor], at: int, order: list[int]) -> RotaryMoments:
    """Return the key moments of the layer at an index of the tensors; `order` as `Rotary.order` gives it."""
    covariance = unpack_covariance(tensors["key_deviation"][at], tensors["key_factor"][at])
    same = order == sorted(order)
    turning = None if same else torch.tensor(order)
    return RotaryMoments(tensors["key_mean"][at], covariance, tensors["key_frequencies"][at], turning)


def read(path: Path) -> bytes:
    """Read a file that must lie in its folder.

    Raises:
        CalibrationNotFoundError: It does not exist.
        CalibrationFormatError: It is a link that leads out of the folder, no plain file, or too large.
        CalibrationError: It can't be read.
    """
    try:
        real = path.resolve(strict=True)
        # A snapshot in the Hub's cache is a folder of links into the `blobs` beside it.
        homes = {path.parent.resolve(), path.parent.resolve().parent.parent / "blobs"}
        if real.parent not in homes:
            raise CalibrationFormatError(
                f"{path.name} in {path.parent} is a link that leads out of the folder.", fix="put the file itself there"
            )
        if not real.is_file():
            raise CalibrationFormatError(f"{path} is not a file.", fix="give the folder of a calibration")
        if real.stat().st_size > _MOST_FILE_BYTES:
            raise _damaged(f"it has {real.stat().st_size:,} bytes, more than any calibration")
        return real.read_bytes()
    except FileNotFoundError:
        raise CalibrationNotFoundError(
            f"There is no {path.name} in {path.parent}.", fix="give a folder made by Calibration.save_pretrained"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"Can't read {path}: {error}.", fix="check the path and its permissions") from None


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; what was there before stays until the new one is complete.

    Raises:
        CalibrationError: It can't be written.
    """
    with writing(path.parent):
        part = path.parent / f".{path.name}.{secrets.token_hex(8)}.part"
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong when writing into a folder into a `CalibrationError`."""
    try:
        yield
    except OSError as error:
        raise CalibrationError(
            f"Can't write into {folder}: {error.strerror or error}. What was there before is unchanged.",
            fix="make room, or choose a folder that can be written",
        ) from error


def lock_of(folder: Path) -> Path:
    """Name the file whose lock a process holds while it writes a folder; it lies outside of the folder."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"patchattn-{name}.lock"


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    if len(data) < 8:
        raise _damaged(f"it has {len(data)} bytes")
    (size,) = struct.unpack("<Q", data[:8])
    if size > _MOST_HEADER_BYTES:
        raise _damaged(f"its header claims {size:,} bytes, so it is not a safetensors file or the header is oversized")
    if 8 + size > len(data):
        raise _damaged(f"it is cut off: {len(data):,} bytes, the header alone needs {8 + size:,}")
    try:
        header = json.loads(data[8 : 8 + size].decode("utf-8"))
    except (ValueError, RecursionError):
        raise _damaged("its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged("its header is not a JSON object")
    return header, memoryview(data)[8 + size :]


def _begin(entry: Any) -> int:
    try:
        begin = entry["data_offsets"][0]
    except (TypeError, KeyError, IndexError):
        begin = None
    if type(begin) is not int:
        raise _damaged("a tensor has no offsets")
    return begin


def _tensor(name: str, entry: dict[str, Any], body: memoryview, begin: int) -> tuple[Tensor, int]:
    """Read one tensor that must start where the one before ended."""
    shape, offsets = entry.get("shape"), entry["data_offsets"]
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
    if dtype is None:
        raise _damaged(f"{name} has dtype {entry.get('dtype')!r}, expected one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**32 for n in shape):
        raise _damaged(f"{name} has no proper shape")
    if len(shape) > 8 or not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise _damaged(f"{name} has no proper shape or offsets")
    items = 1
    for n in shape:
        items *= n
    if offsets[0] != begin or offsets[1] - offsets[0] != items * dtype.itemsize:
        raise _damaged(f"{name} has offsets {offsets} that do not fit its shape {shape}")
    if offsets[1] > len(body):
        raise _damaged(f"it is cut off within {name}")
    if not items:
        return torch.empty(shape, dtype=dtype), offsets[1]
    tensor = torch.frombuffer(bytearray(body[offsets[0] : offsets[1]]), dtype=dtype)
    return tensor.reshape(shape), offsets[1]


def _manifest(text: str) -> tuple[Manifest, frozenset[str]]:
    """Read a manifest of this schema or an earlier one, and name the tensors that the earlier one has beyond this."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged("its manifest is not JSON") from None
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if version == 1 and type(version) is int:
        # Its key moments were of turned keys, for a few lengths; nothing uses those any more.
        text = json.dumps({name: value for name, value in fields.items() if name not in _OF_SCHEMA_1} | _SINCE_SCHEMA_1)
        return _validated(text), frozenset({"key_mean", "key_deviation", "key_factor"})
    if type(version) is int and version != SCHEMA_VERSION:
        raise CalibrationFormatError(
            f"The calibration has schema version {version}; this version of patchattn reads 1 and {SCHEMA_VERSION}.",
            fix="upgrade patchattn",
        )
    return _validated(text), frozenset()


def _validated(text: str) -> Manifest:
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'manifest'}: {problem['msg']}" for problem in error.errors()
        )
        raise _damaged(f"its manifest is not valid: {wrong}") from None


def _check_factors(deviation: Tensor, factor: Tensor, dim: int) -> None:
    """A factor of a correlation matrix has rows of length one, or zero where the key never varies."""
    if (deviation < 0).any():
        raise _damaged("key_deviation is negative")
    rows, _ = torch.tril_indices(dim, dim)
    lengths = torch.zeros(*factor.shape[:-1], dim).index_add_(-1, rows, factor.float().square())
    if (torch.where(deviation > 0, lengths - 1, 0).abs() > _SPREAD_OF_ROUNDING).any():
        raise _damaged("key_factor is not the factor of a correlation matrix, so the covariance would not be right")


def _damaged(what: str) -> CalibrationFormatError:
    return CalibrationFormatError(
        f"This is not a valid calibration: {what}.", fix="get the file again, or measure the calibration again"
    )
