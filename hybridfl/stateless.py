"""A net as a function of its weights."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hybridfl.params import Params


class _Slot(NamedTuple):
    """A place in a module that holds a tensor, and the name that the tensor has in the net."""

    name: str
    members: MutableMapping[str, Tensor | None]
    key: str


_SLOTS: WeakKeyDictionary[nn.Module, list[_Slot]] = WeakKeyDictionary()


def run_net(net: nn.Module, params: Params, buffers: Params, x: Tensor) -> Tensor:
    """Logits of the net with these tensors in place of its own; those in ``params`` go first.

    What ``torch.func.functional_call`` does with one tensor under all names it is tied to, but which looks through all modules at
    every call: with a small net that takes as long as the net. Here the places are found once, so that a net must not get new
    parameters or buffers after its first call.
    """
    slots = _SLOTS.get(net)
    if slots is None:
        slots = _SLOTS[net] = _slots(net)
    before = [slot.members[slot.key] for slot in slots]
    try:
        for name, members, key in slots:
            tensor = params.get(name)
            if tensor is None:
                tensor = buffers.get(name)
            if tensor is not None:
                members[key] = tensor
        return cast(Tensor, net(x))
    finally:
        for slot, tensor in zip(slots, before, strict=True):
            slot.members[slot.key] = tensor


def _slots(net: nn.Module) -> list[_Slot]:
    """All places, tied ones under the first name of their tensor, as ``named_parameters`` has it."""
    names: dict[int, str] = {}
    found = []
    for prefix, module in net.named_modules():
        for members in (module._parameters, module._buffers):
            for key, tensor in members.items():
                if tensor is not None:
                    name = names.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                    found.append(_Slot(name, members, key))
    return found
