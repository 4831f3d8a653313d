"""Other libraries' optimizers on tensors without values, with the counts of `dispatch.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import peers
import torch
from byte_floor import Passes, lowest
from dispatch import Cost, DispatchCounter
from peers import library
from shapes import module_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Build = Callable[[nn.Module, float], peers.Runner]


def bitsandbytes_adamw8bit(module: nn.Module, lr: float) -> peers.Runner:
    """Build bitsandbytes' AdamW with blocks of 256 in 8 bits."""
    return peers.torchs(library("bitsandbytes").optim.AdamW8bit)(module, lr)


def torchao_adamw8bit(module: nn.Module, lr: float) -> peers.Runner:
    """Build torchao's AdamW with blocks of 256 in 8 bits."""
    return peers.torchs(library("torchao.optim").AdamW8bit)(module, lr)


@dataclass(frozen=True)
class Peer:
    """How another library's optimizer is built, and what its step is like.

    together: its kernels take all parameters at once; else one parameter is counted for all of its shape.
    is_factored: it keeps row and column sums of matrices, clips by the update's RMS and scales by the parameter's.
    counts_on_device: its step counters are on the device; else on the host.
    """

    build: Build
    together: bool = False
    is_factored: bool = False
    counts_on_device: bool = False

    def passes(self, shape: tuple[int, ...]) -> Passes:
        """Return how often its step must read what."""
        return Passes(grad=2 + (len(shape) > 1), param=2) if self.is_factored else Passes()


ADAMW, SGD, ADAFACTOR = torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor
PEERS = {
    "torch AdamW fused": Peer(peers.torchs(ADAMW, fused=True), together=True, counts_on_device=True),
    "torch AdamW foreach": Peer(peers.torchs(ADAMW, foreach=True), together=True),
    "torch AdamW for-loop": Peer(peers.torchs(ADAMW, foreach=False)),
    "torch SGD fused": Peer(peers.torchs(SGD, fused=True), together=True),
    "torch SGD foreach": Peer(peers.torchs(SGD, foreach=True), together=True),
    "torch SGD for-loop": Peer(peers.torchs(SGD, foreach=False)),
    "torch Adafactor foreach": Peer(peers.torchs(ADAFACTOR, foreach=True), together=True, is_factored=True),
    "torch Adafactor for-loop": Peer(peers.torchs(ADAFACTOR, foreach=False), is_factored=True),
    "lomo-optim AdaLomo": Peer(peers.lomo_optim_adalomo, is_factored=True),
    "lomo-optim Lomo": Peer(peers.lomo_optim_lomo),
    "pytorch_optimizer AdaLOMO": Peer(peers.pytorch_optimizer_adalomo, is_factored=True),
    "bitsandbytes AdamW8bit": Peer(bitsandbytes_adamw8bit),
    "torchao AdamW8bit, not compiled": Peer(torchao_adamw8bit),
}


def count_peer(peer: Peer, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[Cost, int]:
    """Return the cost of a step of all parameters, and the fewest bytes of such a step.

    Raises:
        MissingPeer: if the library is not installed.
    """
    if peer.together:
        return _count(peer, shapes, dtype)
    total, floor = Cost(), 0
    for shape, times in Counter(shapes.values()).items():
        cost, fewest = _count(peer, {"layer.weight": shape}, dtype)
        total, floor = total + cost * times, floor + fewest * times
    return total, floor


def _count(peer: Peer, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[Cost, int]:
    """Make two steps of an optimizer, which allocates its state in the first, and count the second."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.compiler.set_stance("force_eager"):
        module = module_of(shapes, dtype)
        with DispatchCounter():
            runner = peer.build(module, 1e-3)
            runner.load([torch.empty_like(param) for param in module.parameters()])
            runner.step()
            runner.load([torch.empty_like(param) for param in module.parameters()])
        steps = list(step_counters(runner.optimizer))
        counter = DispatchCounter(on_host=() if peer.counts_on_device else steps)
        with counter:
            runner.step()
        state = state_bytes(runner) - sum(step.element_size() for step in steps)
    params = [(shape, torch.Size(shape).numel() * dtype.itemsize) for shape in shapes.values()]
    return counter.cost, 2 * state + sum(lowest(nbytes, 0, peer.passes(shape)) for shape, nbytes in params)


def step_counters(optimizer: Any) -> Iterator[Tensor]:
    """Yield the step counters that are tensors."""
    for state in getattr(optimizer, "state", {}).values():
        if isinstance(state.get("step"), Tensor):
            yield state["step"]


def state_bytes(runner: peers.Runner) -> int:
    """Return the bytes that an optimizer of any library keeps of its parameters, tables of codes not among them."""
    params = list(runner.module.parameters())
    others = {_storage(tensor) for param in params for tensor in (param, param.grad) if tensor is not None}
    found: dict[int, int] = {}
    for tensor in _kept(vars(runner.optimizer)):
        if _storage(tensor) not in others:
            found[_storage(tensor)] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def _kept(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        yield from _kept({name: getattr(value, name) for name in value.__tensor_flatten__()[0]})
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _kept([each for key, each in value.items() if "qmap" not in str(key)])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _kept(each)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
