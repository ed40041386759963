# SPDX-License-Identifier: Apache-2.0
"""Count the instructions a warp really executes, from cuobjdump's text, without a GPU.

A static count says nothing about a kernel whose rows outside the image are skipped by branches, and counts the
residual nobody passed. So the integer and predicate instructions are followed for lane 0 (all branches of our kernels
are warp-uniform); everything else, floating point and memory above all, yields "unknown". A branch on an unknown
value is an error, never a guess.
"""

from __future__ import annotations

import re
import struct
from collections import Counter

MASK = 0xFFFFFFFF
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@(!?)(U?P[0-9T]+)\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;")


class Unknown(Exception):
    """A branch depends on a value the emulator does not follow."""


def parse(text: str) -> list[tuple]:
    """[(address, guard or None, opcode, modifiers, operands)] of one function."""
    code = []
    for line in text.splitlines():
        m = _LINE.match(line)
        if m:
            op, *mods = m[4].split(".")
            guard = (m[2] == "!", m[3]) if m[3] else None
            operands = [o.strip().replace(".reuse", "") for o in m[5].split(",")] if m[5] else []
            code.append((int(m[1], 16), guard, op, mods, operands))
    return code


def signed(v: int) -> int:
    return v - (1 << 32) if v & 0x80000000 else v


class Warp:
    """Registers of lane 0 of one warp; None is unknown."""

    def __init__(self, constants: dict[int, int], tid: int, block: int):
        self.constants, self.special = constants, {"SR_TID.X": tid, "SR_CTAID.X": block, "SR_CgaCtaId": 0}
        self.regs: dict[str, int | None] = {}

    def read(self, operand: str) -> int | None:
        negative = operand.startswith("-") and not operand.startswith("-0x")
        inverted = operand.startswith("~")
        o = operand.lstrip("-~") if negative or inverted else operand
        absolute = o.startswith("|")
        o = o.strip("|")
        if o in ("RZ", "URZ", "SRZ"):
            v = 0
        elif m := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", o):
            v = self.constants.get(int(m[1], 16))
        elif re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", o):
            v = int(o, 0) & MASK
        else:
            # never written: ptxas keeps predicates in single bits of a register that it does not clear before
            v = self.regs.get(re.sub(r"\.(64|U32|H0_H0|B\d)$", "", o), 0)
        if v is None:
            return None
        if absolute:
            v = abs(signed(v))
        return (-v if negative else ~v if inverted else v) & MASK

    def read64(self, operand: str) -> int | None:
        if operand in ("RZ", "URZ"):
            return 0
        if m := re.fullmatch(r"(U?R)(\d+)(\.64)?", operand):
            lo, hi = self.regs.get(m[1] + m[2]), self.regs.get(f"{m[1]}{int(m[2]) + 1}")
            return None if lo is None or hi is None else lo | hi << 32
        if m := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operand):
            lo, hi = (self.constants.get(int(m[1], 16) + d) for d in (0, 4))
            return None if lo is None or hi is None else lo | hi << 32
        return self.read(operand)

    def write(self, dst: str, v: int | None, wide: bool = False) -> None:
        m = re.fullmatch(r"(U?R)(\d+)", dst)
        if not m:
            return
        self.regs[dst] = None if v is None else v & MASK
        if wide:
            self.regs[f"{m[1]}{int(m[2]) + 1}"] = None if v is None else (v >> 32) & MASK

    def predicate(self, name: str) -> bool | None:
        inverted = name.startswith("!")
        v = True if name.lstrip("!") in ("PT", "UPT") else self.regs.get(name.lstrip("!"), False)
        return None if v is None else bool(v) != inverted


def _is_predicate(o: str) -> bool:
    return re.fullmatch(r"!?U?P[0-9T]+", o) is not None


def _combine(mods: list[str], x, y):
    """x op y with the three-valued logic that keeps `False and unknown` false."""
    if "OR" in mods:
        return True if x is True or y is True else None if x is None or y is None else x or y
    if "XOR" in mods:
        return None if x is None or y is None else x != y
    return False if x is False or y is False else None if x is None or y is None else x and y


def _compare(w: Warp, mods: list[str], ops: list[str]) -> None:
    """(U)ISETP: two results, two numbers, a predicate to combine with, for .EX the low half's result."""
    a, b = w.read(ops[2]), w.read(ops[3])
    unsigned = "U32" in mods
    low = None
    if "EX" in mods and len(ops) > 5:
        low = w.predicate(ops[5])
    if a is None or b is None:
        result = None
    else:
        x, y = (a, b) if unsigned else (signed(a), signed(b))
        kind = mods[0]
        strict = {"LT": x < y, "GT": x > y, "LE": x < y, "GE": x > y, "EQ": x == y, "NE": x != y}[kind]
        if "EX" in mods:
            result = {"EQ": x == y and low, "NE": x != y or low}.get(kind, strict or (x == y and low))
            if low is None and x == y:
                result = None
        else:
            result = strict or (x == y and kind in ("LE", "GE", "EQ"))
    other = w.predicate(ops[4])
    for dst, value in ((ops[0], result), (ops[1], None if result is None else not result)):
        if dst not in ("PT", "UPT"):
            w.regs[dst] = _combine(mods, value, other)


def _add(w: Warp, mods: list[str], ops: list[str]) -> None:
    """IADD3 dst, [carry out...], a, b, c, [carry in...]."""
    dst, rest = ops[0], ops[1:]
    outs = []
    while _is_predicate(rest[0]):
        outs.append(rest.pop(0))
    values = [w.read(o) for o in rest[:3]]
    carries = [w.predicate(o) for o in rest[3:]] if "X" in mods else []
    if None in values or None in carries:
        w.write(dst, None)
        for o in outs:
            w.regs[o] = None
        return
    if "X" in mods:  # -a means ~a here: the +1 came in through the carry
        values = [w.read("~" + o[1:]) if o.startswith("-") else v for o, v in zip(rest[:3], values, strict=True)]
    total = sum(values) + sum(carries)
    w.write(dst, total)
    for i, o in enumerate(outs):
        w.regs[o] = bool(total >> (32 + i) & 1)


def _imad(w: Warp, mods: list[str], ops: list[str]) -> None:
    dst, rest = ops[0], [o for o in ops[1:] if not (_is_predicate(o) and "X" not in mods)]
    kind = set(mods)
    if "X" in kind:
        carries = [w.predicate(o) for o in rest if _is_predicate(o)]
        rest = [o for o in rest if not _is_predicate(o)]
        a, b, c = (w.read(o) for o in rest[:3])
        w.write(dst, None if None in (a, b, c, *carries) else a * b + c + sum(carries))
        return
    a, b = w.read(rest[0]), w.read(rest[1])
    wide = kind & {"WIDE", "HI"}
    c = w.read64(rest[2]) if wide and "HI" not in kind else w.read(rest[2])
    if None in (a, b, c):
        w.write(dst, None, wide="WIDE" in kind)
        return
    if wide and "U32" not in kind:
        a, b = signed(a), signed(b)
    product = a * b
    w.write(dst, (product >> 32) + c if "HI" in kind else product + c, wide="WIDE" in kind)


def _shift(w: Warp, mods: list[str], ops: list[str]) -> None:
    lo, n, hi = w.read(ops[1]), w.read(ops[2]), w.read(ops[3])
    if None in (lo, n, hi):
        w.write(ops[0], None)
        return
    if "W" not in mods:
        n = min(n, 64)
    if len(ops) > 3 and ("U64" in mods or "S64" in mods):
        value = lo | hi << 32
        value = value << n if mods[0] == "L" else value >> n
        w.write(ops[0], value >> 32 if "HI" in mods else value)
    elif mods[0] == "L":
        w.write(ops[0], ((lo | hi << 32) << n >> 32) if "HI" in mods and ops[3] not in ("RZ", "URZ") else lo << n)
    elif "S32" in mods:
        w.write(ops[0], signed(hi if "HI" in mods else lo) >> min(n, 31))
    else:
        w.write(ops[0], (hi if "HI" in mods else lo) >> n)


def _lop3(w: Warp, mods: list[str], ops: list[str]) -> None:
    outs = []
    while _is_predicate(ops[0]):
        outs.append(ops[0])
        ops = ops[1:]
    a, b, c, table = (w.read(o) for o in ops[1:5])
    if None in (a, b, c):
        value = None
    else:
        value = 0
        for k in range(8):
            if table >> k & 1:
                value |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    w.write(ops[0], value)
    for o in outs:
        w.regs[o] = None if value is None else (value & MASK) != 0


def _plop3(w: Warp, mods: list[str], ops: list[str]) -> None:
    a, b, c = (w.predicate(o) for o in ops[2:5])
    for dst, table in ((ops[0], int(ops[5], 0)), (ops[1], int(ops[6], 0))):
        if dst in ("PT", "UPT"):
            continue
        possible = {
            bool(table >> (4 * x + 2 * y + z) & 1)
            for x in ([a] if a is not None else [0, 1])
            for y in ([b] if b is not None else [0, 1])
            for z in ([c] if c is not None else [0, 1])
        }
        w.regs[dst] = possible.pop() if len(possible) == 1 else None


def _minmax(w: Warp, mods: list[str], ops: list[str], add: bool) -> None:
    rest = [o for o in ops[1:] if not _is_predicate(o)]
    choose = w.predicate([o for o in ops[1:] if _is_predicate(o)][-1])
    values = [w.read(o) for o in rest]
    if None in values or choose is None:
        w.write(ops[0], None)
        return
    values = [sum(values[:2]) & MASK, values[2]] if add else values
    values = values if "U32" in mods else [signed(v) for v in values]
    w.write(ops[0], min(values) if choose else max(values))


def _lea(w: Warp, mods: list[str], ops: list[str]) -> None:
    outs = [o for o in ops[1:] if _is_predicate(o)]
    rest = [o for o in ops[1:] if not _is_predicate(o)]
    if mods == ["HI"] and len(rest) == 4:
        a, b, c, n = (w.read(o) for o in rest)
        w.write(ops[0], None if None in (a, b, c, n) else ((a | c << 32) << n >> 32) + b)
        return
    if "HI" in mods or "X" in mods or outs:
        w.write(ops[0], None)  # 64-bit addresses: never branched on
        for o in outs:
            w.regs[o] = None
        return
    a, b, n = (w.read(o) for o in rest)
    w.write(ops[0], None if None in (a, b, n) else (a << n) + b)


def step(w: Warp, op: str, mods: list[str], ops: list[str]) -> None:
    op = op[1:] if op in ("UISETP", "UIADD3", "UIMAD", "ULOP3", "USHF", "ULEA", "UMOV", "USEL", "UPLOP3") else op
    if op == "ISETP":
        _compare(w, mods, ops)
    elif op in ("IADD3", "VIADD"):
        _add(w, mods, [*ops, "RZ"] if op == "VIADD" else ops)
    elif op == "IMAD" and (not mods or mods[0] not in ("MOV", "SHL", "IADD")):
        _imad(w, mods, ops)
    elif op == "IMAD":
        _imad(w, [], ops)
    elif op == "SHF":
        _shift(w, mods, ops)
    elif op == "LOP3":
        _lop3(w, mods, ops)
    elif op == "PLOP3":
        _plop3(w, mods, ops)
    elif op in ("VIMNMX", "IMNMX", "VIADDMNMX"):
        _minmax(w, mods, ops, op == "VIADDMNMX")
    elif op == "LEA":
        _lea(w, mods, ops)
    elif op == "SEL":
        choose = w.predicate(ops[3])
        w.write(ops[0], None if choose is None else w.read(ops[1 if choose else 2]))
    elif op in ("MOV", "R2UR", "SHFL"):
        src = [o for o in ops if not _is_predicate(o)]
        w.write(src[0], w.read(src[1]))
    elif op in ("LDC", "ULDC"):
        w.write(ops[0], w.read64(ops[1]) if "64" in mods else w.read(ops[1]), wide="64" in mods)
    elif op in ("S2R", "S2UR"):
        w.write(ops[0], w.special.get(ops[1]))
    elif op == "P2R":
        bits = [w.predicate(f"P{i}") for i in range(7) if int(ops[3], 0) >> i & 1]
        kept = w.read(ops[2])
        where = [i for i in range(7) if int(ops[3], 0) >> i & 1]
        known = None not in bits and kept is not None
        w.write(ops[0], kept & ~int(ops[3], 0) | sum(b << i for i, b in zip(where, bits, strict=True)) if known else None)
    elif op == "R2P":
        value = w.read(ops[1])
        for i in range(7):
            if int(ops[2], 0) >> i & 1:
                w.regs[f"P{i}"] = None if value is None else bool(value >> i & 1)
    elif op == "HFMA2" and ops[1:3] == ["-RZ", "RZ"]:  # ptxas's other way to write an immediate: two halves
        w.write(ops[0], int.from_bytes(struct.pack("<2e", float(ops[4]), float(ops[3])), "little"))
    elif op == "CS2R":
        w.write(ops[0], 0 if ops[1] == "SRZ" else None, wide="32" not in mods)
    elif op not in ("STG", "STS", "BAR", "BSSY", "BSYNC", "WARPSYNC", "NOP", "LDL", "STL"):
        for o in ops[:1]:  # floating point, memory: unknown
            w.write(o, None, wide="64" in mods or "128" in mods or op[0] == "D" or mods[-1:] == ["F64"])
            if "128" in mods:
                m = re.fullmatch(r"R(\d+)", o)
                for k in range(2, 4):
                    w.write(f"R{int(m[1]) + k}", None)
        for o in ops[1:]:
            if _is_predicate(o) and not o.startswith("!") and op.endswith("SETP"):
                w.regs[o] = None


def run(code: list[tuple], constants: dict[int, int], tid: int, block: int, limit: int = 10_000_000) -> Counter:
    """Opcode -> how often the warp of thread `tid` of block `block` issued it (NOP left out)."""
    w, counts, pc = Warp(constants, tid, block), Counter(), 0
    index = {line[0]: i for i, line in enumerate(code)}
    for _ in range(limit):
        address, guard, op, mods, ops = code[pc]
        if op != "NOP":
            counts[op] += 1
        taken = True
        if guard is not None:
            value = w.predicate(guard[1])
            taken = None if value is None else value != guard[0]
        pc += 1
        if op in ("BRA", "EXIT"):
            extra = [o for o in ops if _is_predicate(o)]
            if extra and taken:
                taken = w.predicate(extra[0])
            if taken is None:
                raise Unknown(f"{op} at {address:#x} depends on a value that is not followed")
            if taken and op == "EXIT":
                return counts
            if taken:
                pc = index[int(ops[-1], 16)]
        elif op in ("BRX", "CALL", "RET"):
            raise Unknown(f"{op} at {address:#x}")
        elif taken is None:  # a guarded write that may or may not happen
            before = dict(w.regs)
            step(w, op, mods, ops)
            w.regs = {k: v if k in before and before[k] == v else None for k, v in w.regs.items()}
        elif taken:
            step(w, op, mods, ops)
    raise Unknown("no EXIT reached")
