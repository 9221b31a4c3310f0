"""Fresh copies of fake values: the same metadata, a storage of its own.

Passes after ours tell aliases by storage, so no two nodes may share a value. Measured on two cores, per value, with static
and with symbolic sizes: an operator's meta function 200 to 500 us and 350 to 1,300 us; the constructors
(``torch.empty_strided`` and ``FakeTensor``) 10 us and 125 us, of which the first computes the storage's size and
contiguity again, 25 us for each operation on a SymInt; what is done here 3 us and 10 us.

``FakeTensor``'s constructor is not called: the state of a value is copied. A torch whose constructor keeps more than is
copied here would lose it in silence, so the first copy in a process is compared with what the constructor makes; when they
differ, the constructor makes every copy, and one warning says so.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch

from moe_lowering.passes.blocks import size_key

_META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class Template:
    """What copies of a FakeTensor are made from: its metadata as it was when the template was made."""

    shape: torch.Size
    stride: tuple[Any, ...]
    offset: Any
    dtype: torch.dtype
    device: torch.device
    state: dict[str, Any]
    storage_bytes: Any
    symbolic: bool

    @staticmethod
    def of(value: FakeTensor) -> Template:
        shape, stride = value.shape, value.stride()
        return Template(
            shape=shape,
            stride=stride,
            offset=value.storage_offset(),
            dtype=value.dtype,
            device=value.fake_device,  # its key in __dict__ has another name before torch 2.12
            state=dict(value.__dict__),
            storage_bytes=value.untyped_storage().nbytes(),
            symbolic=not all(isinstance(n, int) for n in (*shape, *stride)),
        )

    def copy(self) -> FakeTensor:
        """A tensor with a storage of its own."""
        with no_dispatch():
            return self.copier()()

    def copier(self) -> Callable[..., FakeTensor]:
        """``copy`` as a function that has looked everything up: most nodes of a graph get their value from one. It is called
        while nothing is dispatched to Python, perhaps with the node's arguments, which it does not read."""
        make, device, state = self._fake, self.device, self.state
        allocate, is_whole = self._symbolic_allocator() if self.symbolic else self._allocator(), _copies_are_whole()

        def copy(arguments: object = None) -> FakeTensor:
            return _copy_state(allocate(), device, state) if is_whole else make(allocate())

        return copy

    def _allocator(self) -> Callable[[], Tensor]:
        return functools.partial(torch.empty_strided, self.shape, self.stride, dtype=self.dtype, device=_META)

    def _symbolic_allocator(self) -> Callable[[], Tensor]:
        """``torch.empty_strided`` works the number of bytes out, in sympy; here it is known."""
        shape, stride, dtype, size = self.shape, self.stride, self.dtype, self.storage_bytes
        empty, resize = torch.empty, torch.ops.inductor.resize_storage_bytes_.default

        def allocate() -> Tensor:
            base = empty(0, dtype=dtype, device=_META)
            resize(base, size)
            return base.as_strided(shape, stride)

        return allocate

    def viewer(self, base: FakeTensor) -> Callable[[FakeTensor], FakeTensor]:
        """``view``, of values that have the metadata of ``base``; called while nothing is dispatched to Python."""
        if base.dtype != self.dtype or not _copies_are_whole():
            return self.view
        layout = (
            None if Template.of(base)._layout_key() == self._layout_key() else (self.shape, self.stride, self.offset)
        )
        return functools.partial(_alias, layout, self.device, self.state)

    def _layout_key(self) -> list[Any]:
        """Sizes as expressions: to compare SymInts may add a guard."""
        return [*map(size_key, (*self.shape, *self.stride, self.offset))]

    def view(self, base: FakeTensor) -> FakeTensor:
        """A tensor on the storage of ``base``, whose bytes it may read as another dtype of the same size."""
        with in_kernel_invocation_manager(base.fake_mode):
            same = base if base.dtype == self.dtype else base.view(self.dtype)
            meta = torch.as_strided(same, self.shape, self.stride, self.offset)
        return self._fake(meta)

    def _fake(self, meta: Tensor) -> FakeTensor:
        """``FakeTensor(mode, meta, device)``, three times faster: its state is copied and not built and checked again."""
        if _copies_are_whole():
            return _copy_state(meta, self.device, self.state)
        return FakeTensor(self.state["fake_mode"], meta, self.device)


def _copy_state(meta: Tensor, device: torch.device, state: dict[str, Any]) -> FakeTensor:
    fake: Any = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
    if state["fake_mode"]._allow_unsafe_data_ptr_access:
        torch._C._set_warn_deprecated_on_mutable_data_ptr(fake)
    else:
        torch._C._set_throw_on_mutable_data_ptr(fake)
    fake.__dict__.update(state)
    return fake


def _alias(layout: tuple[Any, ...] | None, device: torch.device, state: dict[str, Any], base: FakeTensor) -> FakeTensor:
    """A tensor on the storage of ``base``, with its layout or another one. An operation on a FakeTensor asks Python code for its
    device, even where no operator is dispatched to Python: 4 us. What ``detach`` gives here is none any more."""
    if layout is None:
        return _copy_state(base, device, state)
    with torch._C._PreserveDispatchKeyGuard():  # as ``in_kernel_invocation_manager``
        torch._C._set_meta_in_tls_dispatch_include(True)
        meta = _detach(base).as_strided(*layout)
    return _copy_state(meta, device, state)


_detach = torch._C.TensorBase.detach


@functools.cache
def _copies_are_whole() -> bool:
    """Whether a copy is what the constructor makes; asked once per process, and said once when it is not."""
    with no_dispatch():
        base = torch.empty_strided((2, 3), (3, 1), dtype=torch.float16, device="meta")
    device = torch.device("cpu")
    reference: Any = FakeTensor(FakeTensorMode(), base, device)
    try:
        lost = _differences(_copy_state(base, device, dict(reference.__dict__)), reference) + _lost_in_views(reference)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # what torch changed there
        lost = [f"{type(error).__name__}: {error}"]
    if lost:
        warnings.warn(
            f"moe_lowering: values of lowered graphs are made by torch {torch.__version__}'s FakeTensor constructor, which is "
            f"slower: copies lack {', '.join(lost)}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not lost


def _lost_in_views(base: Any) -> list[str]:
    """What a view of another layout, as ``_alias`` makes it, has not as the constructor's tensor on the same memory has it."""
    layout = ((3, 2), (1, 3), 0)
    with no_dispatch():
        view = _alias(layout, base.fake_device, dict(base.__dict__), base)
    with in_kernel_invocation_manager(base.fake_mode):
        meta = torch.as_strided(base, *layout)
    reference = FakeTensor(base.fake_mode, meta, base.fake_device)
    lost = [f"{name} of views" for name in _differences(view, reference)]
    shares = view.untyped_storage()._cdata == base.untyped_storage()._cdata
    return lost if shares else [*lost, "the storage of views"]


def _differences(copy: Any, reference: Any) -> list[str]:
    """In what a copy differs from the constructor's tensor: attributes, slots, dispatch keys, flags of the C++ object."""
    read: dict[str, Callable[[Any], Any]] = {
        "type": type,
        "__dict__": vars,
        "dispatch keys": lambda t: str(torch._C._dispatch_keys(t)),
        "requires_grad": lambda t: t.requires_grad,
        "refusal of data_ptr": _refusal_of_data_ptr,
        "metadata": lambda t: (t.shape, t.stride(), t.storage_offset(), t.dtype, t.device, t.layout),
    }
    lost = [name for name, of in read.items() if of(copy) != of(reference)]
    slots = (slot for kind in type(reference).__mro__ for slot in _slots(kind))
    return lost + [f"slot {name}" for name in slots if getattr(copy, name, None) != getattr(reference, name, None)]


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _refusal_of_data_ptr(fake: Tensor) -> str:
    """Part of the C++ object: what reading the address of a fake tensor raises or warns."""
    with no_dispatch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fake.untyped_storage().data_ptr()
        except RuntimeError as error:
            return str(error)
    return ""
