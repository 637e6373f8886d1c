"""The mask of a plainly causal call, not written out: which keys are real, and in which slots the queries are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map_only

from patchattn.call.regions import Regions, first_real_slot, host_may_read
from patchattn.errors import ShapeError, UnsupportedCallError
from patchattn.hf.architecture import ORIGINAL_OF, implementation_of

Shape = tuple[int, int, int, int]


class CausalMask(BlockMask):
    """A causal mask of shape [batch, 1, query, keys] in the few numbers that say it all.

    To all code but the library's it is the mask of the model's own attention implementation: cut along queries or keys
    it is a `CausalMask` again, and whatever else is asked of it - an attribute, an operator, a torch function - is
    asked of that mask, written out for the purpose. So a mask that was changed on its way is a tensor, and tensors go
    to the model's own attention.

    It is a `BlockMask` because transformers hands on what is either that or a tensor, and takes anything else for
    padding. Attention modules that treat block masks in a way of their own are refused by `check_support`.

    Args:
        stock: Makes the mask of the model's own implementation, from `arguments`.
        arguments: What transformers gave to make a mask from.
        sizes: Batch, 1, queries, keys.
        query_slot: Slot of the first query: an int where the host knows it, else [] int64.
        valid: [batch, keys] bool; True where a key is real. None where the host knows that all are.
        first: [batch] int64; slot of each sequence's first real token. None with `valid`.
        cut: Queries of the stock mask that were cut off before the first one; None where none were cut off anywhere.
    """

    def __init__(
        self,
        stock: Callable[..., Any],
        arguments: Mapping[str, Any],
        sizes: Shape,
        query_slot: Tensor | int,
        valid: Tensor | None = None,
        first: Tensor | None = None,
        cut: int | None = None,
    ) -> None:
        self.stock, self.arguments, self.sizes, self.query_slot = stock, arguments, sizes, query_slot
        self.valid, self.first, self.cut = valid, first, cut
        self.known: dict[tuple[int, int, int], Regions] = {}
        self.in_graph = torch.compiler.is_compiling()

    @property
    def shape(self) -> Shape:
        """[batch, 1, query, keys]."""
        return self.sizes

    ndim = 4

    @property
    def device(self) -> torch.device:
        """Where the call is computed."""
        return torch.device(self.arguments["device"])

    def dim(self) -> int:
        """Return the number of dimensions, 4."""
        return 4

    def size(self, dim: int | None = None) -> Any:
        """Return the sizes, or that of a dimension."""
        return self.sizes if dim is None else self.sizes[dim]

    def numel(self) -> int:
        """Return the number of entries."""
        return self.sizes[0] * self.sizes[2] * self.sizes[3]

    def contiguous(self, **_: Any) -> CausalMask:
        """Return the mask itself, which has no layout in memory."""
        return self

    def clone(self, **_: Any) -> CausalMask:
        """Return the mask itself, which does not change."""
        return self

    def detach(self) -> CausalMask:
        """Return the mask itself, which has no gradient."""
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        """Move the mask to a device; the mask of another dtype is written out."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None:
            return self.written_out().to(device=device, dtype=dtype, **kwargs)
        if device is None or torch.device(device) == self.device:
            return self

        def moved(x: Any) -> Any:
            return x.to(device, **kwargs) if isinstance(x, Tensor) else x

        arguments = {**self.arguments, "device": device, "attention_mask": moved(self.arguments["attention_mask"])}
        slot, valid, first = (moved(x) for x in (self.query_slot, self.valid, self.first))
        return CausalMask(self.stock, arguments, self.sizes, slot, valid, first, self.cut)

    def __getitem__(self, index: Any) -> Any:
        """Cut along queries or keys; any other index is taken of the mask written out."""
        rows, keys = _cut(index, self.sizes)
        if rows is None or keys is None:
            return self.written_out()[index]
        batch, _, queries, all_keys = self.sizes
        begin, end, _ = rows.indices(queries)
        last = keys.indices(all_keys)[1]
        if (begin, end, last) == (0, queries, all_keys):
            return self
        sizes = (batch, 1, max(end - begin, 0), last)
        valid, first = self.valid, self.first
        if valid is not None and first is not None and last < all_keys:
            valid, first = valid[:, :last].clone(), first.clamp(max=last)
        slot, cut = self.query_slot + begin, (self.cut or 0) + begin
        return CausalMask(self.stock, self.arguments, sizes, slot, valid, first, cut)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Refuse a change in place, which would be made to a mask that nobody sees."""
        raise _no_change_in_place()

    def __getattr__(self, name: str) -> Any:
        """Ask the mask written out for what this one does not have."""
        if name.startswith("__") or name in ("stock", "arguments"):
            raise AttributeError(name)
        if name.endswith("_"):
            raise _no_change_in_place()
        return getattr(self.written_out(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Give a function of torch the mask written out."""
        args, kwargs = tree_map_only(CausalMask, CausalMask.written_out, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self) -> str:
        """Return the sizes."""
        return f"CausalMask{self.sizes}"

    __str__ = __repr__

    def written_out(self) -> Tensor:
        """Return the mask of the model's own implementation as a tensor, cut like this one.

        Raises:
            UnsupportedCallError: It has none.
        """
        whole = self._whole()
        if whole is None:
            raise UnsupportedCallError(
                "The model looks into its mask, and its own attention implementation, flash attention, has none.",
                fix="call model.set_attn_implementation('sdpa') before the patch, or unpatch the model",
            )
        return whole

    def own(self) -> Tensor | None:
        """Return what the model's own implementation would have got: None where that knows a causal call as such."""
        return self.stock(**self.arguments) if self.cut is None else self._whole()

    def _whole(self) -> Tensor | None:
        """Make the mask and cut it; None of flash attention without padding, which takes queries for the last slots."""
        whole = self.stock(**{**self.arguments, "allow_is_causal_skip": False})
        if whole is None or self.cut is None:
            return whole
        if whole.ndim == 2:  # of flash attention: the padding
            return whole[:, : self.sizes[3]]
        return whole[:, :, self.cut : self.cut + self.sizes[2], : self.sizes[3]]

    def regions(self, sink_size: int, window_size: int, query: Tensor, key: Tensor, break_even: int = 0) -> Regions:
        """Return the regions of an attention call; all layers of a forward pass share them.

        Args:
            sink_size: Number of first tokens that are always attended.
            window_size: Number of last tokens that are always attended.
            query: [batch, heads, query, dim].
            key: [batch, kv_heads, keys, dim].
            break_even: Queries with fewer bulk keys than this are not asked.

        Raises:
            ShapeError: The mask is of a call of other sizes.
        """
        given = (query.shape[0], 1, query.shape[2], key.shape[2])
        local = (sink_size, window_size, break_even)
        if self.sizes != given and self.sizes[:3] == given[:3] and self.cut is None:
            return self._of_other_keys(given[3]).regions(sink_size, window_size, query, key, break_even)
        if self.sizes != given:
            raise ShapeError(
                f"Expected an attention call of the sizes of its mask, {self.sizes} (batch, 1, queries, keys), got "
                f"{given}: the model changes queries or keys in a way that is not known. Unpatch it for this call."
            )
        if torch.compiler.is_compiling() and not self.in_graph:
            return self._read(*local, query.device)
        if local not in self.known:
            self.known[local] = self._read(*local, query.device)
        return self.known[local]

    def _of_other_keys(self, keys: int) -> CausalMask:
        """Make the mask for the keys of a layer; transformers asks the first layer's cache, which may hold none.

        Raises:
            ShapeError: The padding of so many keys is not known, or where the queries are.
        """
        padding, offset = self.arguments["attention_mask"], self.arguments["q_offset"]
        fits = keys >= self.sizes[2] and (padding is None or padding.shape[1] == keys)
        if isinstance(offset, Tensor) or not fits:
            raise ShapeError(
                f"The mask was made for {self.sizes[3]} keys and the layer has {keys}: the cache of another layer told "
                "their number. Call the model with a dynamic cache and an attention mask of all tokens, or unpatch it."
            )
        arguments = {**self.arguments, "kv_length": keys, "q_offset": keys - self.sizes[2]}
        return mask(**arguments)

    def _read(self, sink_size: int, window_size: int, break_even: int, device: torch.device) -> Regions:
        batch, _, queries, keys = self.sizes
        if self.valid is None or self.first is None:
            return Regions.plain(sink_size, window_size, queries, batch, keys, device, int(self.query_slot), break_even)
        slot = torch.as_tensor(self.query_slot, device=device)
        return Regions(sink_size, window_size, queries, self.valid, self.first, slot, break_even)


def _no_change_in_place() -> UnsupportedCallError:
    return UnsupportedCallError(
        "The model changes its attention mask in place, which is not written out in a patched model.",
        fix="have it make a new mask, with torch.where for instance, or unpatch the model",
    )


def _asked_of_the_mask_written_out(name: str) -> Any:
    def ask(self: CausalMask, *args: Any) -> Any:
        return getattr(self.written_out(), name)(*args)

    return ask


_BINARY = ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor", "matmul")
_OTHERS = ("eq", "ne", "lt", "le", "gt", "ge", "neg", "invert", "abs", "len", "iter", "bool")
for _operator in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHERS):
    setattr(CausalMask, f"__{_operator}__", _asked_of_the_mask_written_out(f"__{_operator}__"))
CausalMask.__hash__ = object.__hash__
CausalMask.to_dense = CausalMask.written_out


def _cut(index: Any, sizes: Shape) -> tuple[slice | None, slice | None]:
    """Return the slices of queries and of leading keys that an index asks for; None, None where it asks for more."""
    index = index if isinstance(index, tuple) else (index,)
    if len(index) == 2 and index[0] is Ellipsis:
        index = (slice(None), slice(None), slice(None), index[1])
    index = (*index, *[slice(None)] * (4 - len(index)))
    if len(index) != 4 or not all(isinstance(part, slice) for part in index):
        return None, None
    ranges = [part.indices(size) for part, size in zip(index, sizes, strict=True)]
    whole = [(0, size, 1) for size in sizes]
    (_, _, step), (first_key, _, key_step) = ranges[2:]
    if ranges[:2] != whole[:2] or (step, first_key, key_step) != (1, 0, 1):
        return None, None
    return index[2], index[3]


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    *,
    config: Any,
    device: Any = "cpu",
    **kwargs: Any,
) -> Any:
    """Make the mask of a call of a patched model: the function transformers calls in place of its own.

    Returns:
        A `CausalMask` where the mask is plainly causal, padding included. Any other (sliding, packed, of the caller) is
        what the mask function of the model's own implementation makes.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, prepare_padding_mask

    # A static cache hands out its own counter, which goes on while the mask is in use.
    q_offset = q_offset.to(device, torch.long, copy=True) if isinstance(q_offset, Tensor) else q_offset
    stock = ALL_MASK_ATTENTION_FUNCTIONS[ORIGINAL_OF[implementation_of(config)]]
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "config": config,
        "device": device,
        **kwargs,
    }
    if mask_function is not causal_mask_function or not isinstance(kv_offset, int) or kv_offset != 0:
        return stock(**arguments)
    sizes = (batch_size, 1, q_length, kv_length)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if _is_plain(padding, q_length, kv_length, q_offset, device):
        return CausalMask(stock, arguments, sizes, q_offset)
    if padding is None:
        valid = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        # A copy in plain strides: those of a view depend on the length, for which a kernel would be compiled again.
        valid = padding[:, :kv_length].to(device=device, dtype=torch.bool, copy=True)
        valid = valid.clone(memory_format=torch.contiguous_format).expand(batch_size, -1)
    # Not as_tensor, which compiles the number in: one graph for each length of a dynamic cache.
    is_tensor = isinstance(q_offset, Tensor)
    query_slot = q_offset if is_tensor else torch.full((), q_offset, dtype=torch.long, device=device)
    return CausalMask(stock, arguments, sizes, query_slot, valid, first_real_slot(valid))


def _is_plain(padding: Tensor | None, q_length: int, kv_length: int, q_offset: int | Tensor, device: Any) -> bool:
    """Say whether the host knows that nothing is padding and that the queries are the last slots."""
    if not host_may_read(torch.device(device)):
        return False
    if not isinstance(q_offset, int) or q_offset + q_length != kv_length:
        return False
    return padding is None or bool(padding.all())
