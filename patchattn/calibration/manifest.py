"""What a calibration says about itself: which model, which text, measured how."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from patchattn.gates.thresholds import LocalShare
from patchattn.moments.gaussian import Estimate

Count = Annotated[int, Field(ge=0, le=2**53)]
Size = Annotated[int, Field(ge=1, le=2**24)]
Text = Annotated[str, Field(max_length=4096)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Fingerprint(_Frozen):
    """What must agree between the measured model and the one at hand.

    Args:
        layers: Number of layers.
        query_heads: Query heads per layer.
        kv_heads: KV heads per layer.
        head_dim: Dimension of queries and keys.
        rope: Parameters of the rotary embedding, as JSON with sorted keys.
        dtype: Dtype of the weights, without `torch.`.
    """

    layers: Size
    query_heads: Size
    kv_heads: Size
    head_dim: Size
    rope: Text
    dtype: Text

    def differences(self, other: Fingerprint) -> list[str]:
        """Say in which fields another fingerprint differs: `field: own value, other's value`."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [f"{name}: {mine[name]}, {theirs[name]}" for name in mine if _read(mine[name]) != _read(theirs[name])]


def _read(value: str | int) -> Any:
    """Read what is JSON: one configuration says 100000 where another of the same model says 100000.0."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


class Corpus(_Frozen):
    """The text that was measured.

    Args:
        name: What the text is.
        sha256: Digest of all token ids, in order; 64 hexadecimal digits.
        tokens: Number of tokens.
    """

    name: Text
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    tokens: Count


class Rotary(_Frozen):
    """Which dimensions of a key the rotary embedding turns together.

    Args:
        layout: `"halves"`: the first half of the turned dimensions with the second; `"interleaved"`: neighbours.
        first: First turned dimension; those before it are not turned.
        size: Number of turned dimensions, even.
    """

    layout: Literal["halves", "interleaved"]
    first: Count
    size: Size

    def order(self, head_dim: int) -> list[int]:
        """Return the dimension at each place of the rotary order, in which `i` and `i + head_dim / 2` turn together."""
        turned, half = list(range(self.first, self.first + self.size)), self.size // 2
        still = [dimension for dimension in range(head_dim) if dimension not in turned]
        ones, others = (turned[:half], turned[half:]) if self.layout == "halves" else (turned[::2], turned[1::2])
        middle = len(still) // 2
        return [*ones, *still[:middle], *others, *still[middle:]]


class PriceSource(_Frozen):
    """What prices were measured with.

    Args:
        estimate: Estimate of the bulk log mass that the probe corrects.
        hidden: Size of the hidden state that it reads.
        fitted: Number of documents that it was fitted to.
        priced: Number of other documents that prices and values are from.
        gated: Open fraction of the gated model that values were measured in.
        held_out: Number of yet other documents on which the patched model's KL was measured.
    """

    estimate: Estimate
    hidden: Size
    fitted: Annotated[int, Field(ge=1, le=2**53)]
    priced: Annotated[int, Field(ge=1, le=2**53)]
    gated: LocalShare
    held_out: Count


class Manifest(_Frozen):
    """Everything about a calibration but its tensors.

    Args:
        model: Name of the measured model.
        commit: Commit of the measured model on the Hub; None if unknown.
        fingerprint: What the model at hand must agree with.
        sink_size: Sink that was measured, tokens.
        window_size: Window that was measured, tokens.
        layers: Indices of the measured layers.
        estimates: Estimates of the bulk log mass that were measured.
        oracle_threshold: Local share below which a pair counts as one that should open, for recall and precision.
        lengths: Lengths of the documents, tokens; each document has one of them, in turn.
        moments: Source of the key moments that the curves were measured with; targets hold for this one.
        documents: Number of documents with bulk keys, of even and of odd index.
        corpus: The text.
        rotary: Which dimensions of a key turn together, for the key moments; None for none.
        moment_documents: Number of documents that key moments were taken from: with `moments="calibration"` others
            than the curves.
        covariance_error: Largest relative error (Frobenius norm) that storing a covariance in half precision makes.
        prices: What prices were measured with; None for none.
        versions: Versions of the libraries it was measured with.
        note: What a reader of the card should know besides; one paragraph, empty for none.
        schema_version: Version of this schema.
    """

    schema_version: Literal[4] = 4
    model: Text
    commit: Text | None = None
    fingerprint: Fingerprint
    sink_size: Count
    window_size: Size
    layers: Annotated[tuple[Count, ...], Field(min_length=1, max_length=4096, strict=False)]
    estimates: Annotated[tuple[Estimate, ...], Field(min_length=1, max_length=3, strict=False)]
    oracle_threshold: LocalShare
    lengths: Annotated[tuple[Size, ...], Field(min_length=1, max_length=64, strict=False)]
    moments: Literal["prompt", "calibration"] = "prompt"
    documents: Annotated[tuple[Count, Count], Field(strict=False)]
    corpus: Corpus
    rotary: Rotary | None = None
    moment_documents: Count = 0
    covariance_error: Annotated[float, Field(ge=0, le=1)] = 0.0
    prices: PriceSource | None = None
    versions: Annotated[dict[Text, Text], Field(max_length=16)]
    note: Text = ""

    @model_validator(mode="after")
    def _in_order(self) -> Manifest:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must ascend without repeats, got {list(self.layers)}")
        if self.layers[-1] >= self.fingerprint.layers:
            raise ValueError(f"layer {self.layers[-1]} does not exist in a model of {self.fingerprint.layers} layers")
        if len(set(self.estimates)) != len(self.estimates):
            raise ValueError(f"estimates repeat: {list(self.estimates)}")
        if self.fingerprint.query_heads % self.fingerprint.kv_heads:
            raise ValueError("the number of query heads must be a multiple of the KV heads")
        if self.rotary is not None:
            dim, turned = self.fingerprint.head_dim, self.rotary
            if dim % 2 or turned.size % 2 or turned.first + turned.size > dim:
                raise ValueError(f"{turned!r} does not fit keys of dimension {dim}")
        elif self.moments == "calibration":
            raise ValueError('moments is "calibration", but there are no key moments')
        if self.prices is not None and (self.moments, self.prices.estimate in self.estimates) != ("prompt", True):
            raise ValueError("prices go with the moments of the prompt and an estimate that was measured")
        if sum(self.documents) == 0:
            raise ValueError("it must have measured at least one document")
        return self

    @property
    def n_documents(self) -> int:
        """Number of documents measured."""
        return sum(self.documents)
