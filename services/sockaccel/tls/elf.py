"""Where functions begin in ELF files."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection


def functions(path: Path, names: Iterable[str]) -> dict[str, int]:
    """Offset in the file of each of those functions it defines. OSError: it cannot be read; nothing if it is no ELF file."""
    with path.open("rb") as file:
        try:
            return _functions(file, set(names))
        except ELFError:
            return {}


def _functions(file: BinaryIO, names: set[str]) -> dict[str, int]:
    elf = ELFFile(file)
    segments = [each for each in elf.iter_segments() if each["p_type"] == "PT_LOAD"]
    found: dict[str, int] = {}
    for table in (elf.get_section_by_name(".dynsym"), elf.get_section_by_name(".symtab")):
        if not isinstance(table, SymbolTableSection) or names <= found.keys():
            continue
        for symbol in table.iter_symbols():
            if symbol.name not in names or symbol["st_shndx"] == "SHN_UNDEF" or symbol["st_info"]["type"] != "STT_FUNC":
                continue
            at = symbol["st_value"]
            for segment in segments:
                if segment["p_vaddr"] <= at < segment["p_vaddr"] + segment["p_filesz"]:
                    found[symbol.name] = at - segment["p_vaddr"] + segment["p_offset"]
    return found


def contains(path: Path, text: bytes) -> bool:
    """Whether a file has these bytes in it. OSError: it cannot be read."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        return whole.find(text) >= 0
