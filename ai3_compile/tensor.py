"""ai3.Tensor: what Model.predict returns when no type is asked for; and what a Model takes as input."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

from .errors import TensorTypeError


class Tensor:
    """An array that shares its memory with the others it is turned into: `torch()`, `numpy()`, DLPack."""

    def __init__(self, data: torch.Tensor) -> None:
        self._data = data

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._data.dtype

    @property
    def device(self) -> torch.device:
        return self._data.device

    def torch(self) -> torch.Tensor:
        """The same memory as a torch.Tensor."""
        return self._data

    def numpy(self) -> Any:
        """The same memory as a numpy.ndarray; copied where it is not in the CPU's memory."""
        return self._data.detach().cpu().numpy()

    def to(self, out_type: Any) -> Any:
        """As `out_type`: torch.Tensor, numpy.ndarray, ai3.Tensor or None for this one, or the type's name.

        Raises TensorTypeError for another type.
        """
        return convert(self._data, out_type)

    def __dlpack__(self, **keywords: Any) -> Any:
        return self._data.__dlpack__(**keywords)

    def __dlpack_device__(self) -> Any:
        return self._data.__dlpack_device__()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return f"ai3.Tensor({self._data!r})"


def to_torch(value: Any) -> torch.Tensor:
    """An input as a torch.Tensor that shares its memory; a NumPy array of negative strides, or of the other byte order,
    is copied.

    Raises TensorTypeError for what is no tensor, no array and no object with `__dlpack__`.
    """
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Tensor):
        return value.torch()
    if _name_of(type(value)) in ("numpy.ndarray", "numpy.memmap"):
        if any(stride < 0 for stride in value.strides) or not value.dtype.isnative:
            value = value.astype(value.dtype.newbyteorder("="))
        with warnings.catch_warnings():
            # torch warns of arrays that may not be written: a Model copies one before it writes to it.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            try:
                return torch.from_numpy(value)
            except TypeError as error:
                raise TensorTypeError(found=f"a NumPy array of {value.dtype}", reason=f" ({error})") from error
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    raise TensorTypeError(found=f"{type(value).__module__}.{type(value).__qualname__}", reason="")


def is_read_only(value: Any) -> bool:
    """Whether the memory of an input is not to be written: a NumPy array may say so."""
    return _name_of(type(value)) in ("numpy.ndarray", "numpy.memmap") and not value.flags.writeable


def convert(data: torch.Tensor, out_type: Any) -> Any:
    """A result as `out_type`: a type or its name; None stands for ai3.Tensor."""
    if out_type is None or out_type is Tensor:
        return Tensor(data)
    name = out_type if isinstance(out_type, str) else _name_of(out_type)
    if name in ("torch", "torch.Tensor") or (isinstance(out_type, type) and issubclass(out_type, torch.Tensor)):
        return data
    if name in ("numpy", "numpy.ndarray"):
        return Tensor(data).numpy()
    # Array libraries that speak DLPack have from_dlpack at their top (the Python array API standard).
    library = sys.modules.get(name.partition(".")[0])
    if isinstance(out_type, type) and hasattr(library, "from_dlpack"):
        return library.from_dlpack(data)  # type: ignore[union-attr]
    raise TensorTypeError(found=f"the output type {name}", reason="")


def _name_of(type_: Any) -> str:
    return f"{getattr(type_, '__module__', '')}.{getattr(type_, '__name__', type_)}"
