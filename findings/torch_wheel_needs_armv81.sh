#!/usr/bin/env bash
# torch 2.10.0, the aarch64 wheel on PyPI (manylinux_2_28_aarch64): `import torch` ends with an illegal instruction on ARMv8.0 processors.
#
# One would guess that a manylinux wheel for aarch64 runs on every 64-bit ARM processor, all the more as torch is compiled with "outline
# atomics": its own code calls __aarch64_ldadd8_relax and the like, which ask the processor before they take ARMv8.1's atomic instructions.
# But libc10.so holds the allocator mimalloc, which is compiled for ARMv8.1: its functions have those instructions in line and ask nobody,
# and one of them runs as soon as the library is loaded. Cortex-A72 (Raspberry Pi 4, AWS Graviton 1) and Cortex-A53 lack them; from
# Cortex-A55, Neoverse N1 (Graviton 2) and Apple M1 on all is well.
#
# Nothing of the wheel is run here: the atomic instructions in libc10.so's functions are counted. Seen: in 52 functions, which all are
# mimalloc's, and in 7 of those that ask.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check pyelftools==0.32
"$tmp/venv/bin/pip" download -q --disable-pip-version-check --no-deps --only-binary :all: --platform manylinux_2_28_aarch64 \
  --python-version 3.11 --implementation cp --dest "$tmp" torch==2.10.0
"$tmp/venv/bin/python" - "$tmp"/torch-*.whl <<'PY'
import io
import struct
import sys
import zipfile

from elftools.elf.elffile import ELFFile

library = ELFFile(io.BytesIO(zipfile.ZipFile(sys.argv[1]).read("torch/lib/libc10.so")))
text = library.get_section_by_name(".text")
code, start = text.data(), text["sh_addr"]
words = struct.unpack(f"<{len(code) // 4}I", code[: len(code) // 4 * 4])


def atomic(word):  # LDADD, LDCLR, LDSET, SWP and their kin; CAS
    return word & 0x3F200C00 == 0x38200000 or word & 0x3FA07C00 == 0x08A07C00


found = {}
for name in (".symtab", ".dynsym"):
    table = library.get_section_by_name(name)
    for symbol in table.iter_symbols() if table else ():
        if symbol["st_info"]["type"] == "STT_FUNC" and start <= symbol["st_value"] < start + len(code):
            first = (symbol["st_value"] - start) // 4
            count = sum(map(atomic, words[first : first + symbol["st_size"] // 4]))
            if count:
                found[symbol.name] = count
asking = sorted(name for name in found if name.startswith("__aarch64_"))
inline = sorted(found.keys() - set(asking))
print(f"{len(inline)} functions have atomic instructions in line: {', '.join(inline[:6])}, …\n{len(asking)} ask first: {', '.join(asking)}")
assert asking, "no outline atomics any more"
assert len(inline) >= 40 and all(name.startswith(("mi_", "_mi_")) for name in inline), "the behaviour has changed"
PY
