"""From a file into a bank, in the words of the file: what is refused are its keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from heatsink.runtime.adapter_file import inspect_adapter
from heatsink.runtime.adapter_info import AdapterInfo
from heatsink.runtime.adapters import AdapterBank
from heatsink.runtime.errors import AdapterError, NotBuilt


def add_file(
    bank: AdapterBank, name: str, path: str | Path, *, ignore: Sequence[str] = ()
) -> AdapterInfo:
    """Read a LoRA file and take it into the bank, whole or not at all.

    Args:
        bank: with `targets`.
        name: what requests call it.
        path: a safetensors file.
        ignore: keys, or shell patterns of keys, that are read as if the file didn't hold them.

    Raises:
        NotBuilt: the bank has no list of the model's modules.
        UnsafeFile, DamagedFile: nothing can be read of the file.
        AdapterError: `refused` maps each key that can't be applied, by the model or by the bank's
            ports, to its reason.
        InvalidRequest: the name is none, or a pattern of `ignore` matches no key.
    """
    if bank.targets is None:
        raise NotBuilt(
            "this engine was opened without the list of its modules, by which a file is read; give "
            "the adapter's deltas"
        )
    receipt, deltas = inspect_adapter(path, bank.targets, ignore=ignore)
    if not receipt.accepted:
        raise AdapterError(receipt.refusal(), receipt.refused)
    try:
        return bank.add(name, deltas, receipt)
    except AdapterError as error:
        keys = {
            key: error.refused[f"{component}.{module}"]
            for key, (component, module, _) in receipt.applied.items()
            if f"{component}.{module}" in error.refused
        }
        raise AdapterError(f"{path}: {error}", keys) from None
