"""Memory that components share which never run at the same time: an arena, and its lock.

On a CUDA device a workspace has a stream and a pool of graphs of its own; components that may run
at the same time, as a VAE beside a UNet, are on workspaces of their own.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from heatsink.runtime.native.cuda_graph import Graphs
from heatsink.runtime.native.program import Arena

VAE = "vae"


class User(Protocol):
    """What builds programs on a workspace."""

    def drop_programs(self) -> None:
        """Forget the programs: their arena goes."""
        ...


class Workspace:
    """One arena for components that never run at the same time, and the lock that sees to it.

    The arena grows to the largest plan it has met and never shrinks. Growing moves it, so the
    programs on it are dropped, and built again when they are next needed; `reserve` plans for a
    largest batch beforehand.

    Attributes:
        device: of the arena.
        lock: held by who uses the arena; `turn` takes it.
        arena: as it is now.
        graphs: on a CUDA device, what captures programs and has the stream; None elsewhere.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.lock = threading.RLock()
        self.graphs = Graphs(self.device) if self.device.type == "cuda" else None
        self.arena = Arena(0, self.device)
        self._users: weakref.WeakSet[User] = weakref.WeakSet()

    @property
    def bytes(self) -> int:
        """What the arena holds now."""
        return self.arena.memory.numel()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock; on a CUDA device, work on the workspace's stream meanwhile."""
        with self.lock, self.graphs.ordered() if self.graphs else contextlib.nullcontext():
            yield

    def join(self, user: User) -> None:
        """Let a component build programs on the arena."""
        self._users.add(user)

    def fit(self, size: int) -> Arena:
        """The arena, grown if it is smaller than `size` bytes."""
        if self.bytes < size:
            for user in self._users:
                user.drop_programs()
            # The old one is freed before the larger one is asked for.
            self.arena = Arena(0, self.device)
            self.arena = Arena(size, self.device)
        return self.arena

    def copies(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of what lies in the arena; they are the caller's own. In a turn."""
        made = {name: value.clone() for name, value in values.items()}
        self.lend(made.values())
        return made

    def lend(self, values: Iterable[Tensor]) -> None:
        """Give the caller of a turn what was made in it; memory stays until its stream is done."""
        if self.graphs:
            self.graphs.lend(values)

    def settle(self) -> None:
        """Wait for what is queued on the stream, before graphs go that may be running."""
        if self.graphs:
            self.graphs.stream.synchronize()


class Workspaces:
    """The workspaces of an engine's components.

    On a CUDA device the VAE has one of its own, since it decodes one request while the UNet runs
    the next. On the CPU all of them share one: two at once would only share the cores.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._found: dict[str, Workspace] = {}

    def of(self, component: str) -> Workspace:
        """The workspace of a component, by its name."""
        kind = VAE if self._device.type == "cuda" and component.startswith(VAE) else ""
        if kind not in self._found:
            self._found[kind] = Workspace(self._device)
        return self._found[kind]
