"""Statements to the instruction array that the core executes: operands become offsets into a warp's register file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tests.ptxsim.cfg import reconvergence
from tests.ptxsim.faults import Unsupported
from tests.ptxsim.parser import SIZES, KernelText, ModuleText, Statement, Variable, immediate

LANES = 32
RANGE_BITS = 36  # allocation i begins at (i + 1) << RANGE_BITS, see core/memory.h
WINDOWS = {"global": 0, "const": 0, "shared": 1, "local": 2, "param": 3, "": 4}  # Space in core/memory.h
INSTRUCTION = np.dtype([("op", "i4"), ("guard", "i4"), ("guard_flip", "u4"), ("mods", "u4"), ("a", "i4", (20,))])

# Mod in core/machine.h, in its order.
MODS = {
    name: 1 << bit
    for bit, name in enumerate(
        ["ftz", "sat", "rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna", "approx", "full", "NaN", "relu"]
    )
}
COMPARISONS = {
    name: code
    for code, name in enumerate(
        ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
    )
}
COMPARISONS |= {"lo": 2, "ls": 3, "hi": 4, "hs": 5}
COMBINATIONS = {"and": 1, "or": 2, "xor": 3}
# What each lane or warp finds in a special register; start_warp in core/machine.cpp fills them in this order.
LANE_REGISTERS = [
    "tid.x",
    "tid.y",
    "tid.z",
    "laneid",
    "warpid",
    "lanemask_eq",
    "lanemask_lt",
    "lanemask_le",
    "lanemask_gt",
    "lanemask_ge",
]
# Launch constants; launch.py knows their values.
LAUNCH_REGISTERS = [
    "ntid.x",
    "ntid.y",
    "ntid.z",
    "nctaid.x",
    "nctaid.y",
    "nctaid.z",
    "dynamic_smem_size",
    "total_smem_size",
    "nwarpid",
]
BLOCK_REGISTERS = ["ctaid.x", "ctaid.y", "ctaid.z"]

# Sources that are not as wide as the operation's type: position to bytes, 0 for twice the type.
WIDTHS = {
    "shl": {2: 4},
    "shr": {2: 4},
    "bfe": {2: 4, 3: 4},
    "bfi": {3: 4, 4: 4},
    "mad.wide": {0: 0, 3: 0},
    "mul.wide": {0: 0},
    "popc": {0: 4},
    "clz": {0: 4},
}
# How many operands an opcode takes, the least and the most.
OPERANDS = {
    (0, 0): "exit fence membar ret trap",
    (0, 5): "cp",
    (1, 1): "activemask bra nanosleep",
    (1, 2): "prefetch",
    (1, 4): "bar barrier",
    (2, 2): "abs clz cos cvta ex2 isspacep ldmatrix lg2 mov neg not popc rcp rsqrt sin sqrt tanh",
    (2, 3): "createpolicy cvt ld st",
    (2, 4): "red",
    (3, 3): "add and copysign div match max min mul or redux rem shl shr sub vote xor",
    (3, 5): "atom",
    (3, 4): "setp",
    (4, 4): "bfe fma mad mma prmt selp shf",
    (5, 5): "bfi lop3 shfl",
    (2, 9): "call",
}
OPERANDS = {base: counts for counts, bases in OPERANDS.items() for base in bases.split()}
# Tokens of loads and stores that say how, not what.
CACHING = re.compile(
    r"(L1|L2)::\w+|ca|cg|cs|cv|lu|wb|wt|nc|weak|global|shared(::cta)?|local|param|const|v[24]|cta|gpu|sys|cluster"
)
STRONG = {"volatile", "relaxed", "acquire", "release", "mmio"}


Row = tuple[str, list[int], int]  # an operation's name, its operands, its modifiers


@dataclass
class LoweredKernel:
    """What a launch needs. Offsets are bytes of the register file of a warp, which holds 32 lanes of each register."""

    name: str
    params: list[Variable]
    statements: list[Statement]
    code: np.ndarray
    register_bytes: int
    constants: list[tuple[int, int, int]]  # offset, bytes (0: a predicate), value
    specials: dict[str, int]  # special register to offset
    static_shared: int
    local_bytes: int
    globals: list[Variable]
    threads: tuple[int, int]  # the least and the most a block may have


def lower(kernel: KernelText, module: ModuleText, lookup: Callable[[str, int], int]) -> LoweredKernel:
    """lookup: the number of an operation with its modifiers, or -1. Raises Unsupported with the opcode and PTX line."""
    return _Lowering(kernel, module, lookup).run()


class _Lowering:
    def __init__(self, kernel: KernelText, module: ModuleText, lookup: Callable[[str, int], int]):
        self.kernel, self.lookup = kernel, lookup
        self.size = 0
        self.registers: dict[str, int] = {}
        self.constants: dict[tuple[int, int], int] = {}
        self.specials = {name: self.allocate(4) for name in (*LANE_REGISTERS, *LAUNCH_REGISTERS, *BLOCK_REGISTERS)}
        self.symbols: dict[str, int] = {}
        self.globals: list[Variable] = []
        self.static_shared, self.local_bytes = self.place_variables(module)
        self.rows: list[tuple] = []
        self.join = -1  # where the sides of the current branch meet

    def place_variables(self, module: ModuleText) -> tuple[int, int]:
        """Gives every variable that the kernel names an address; returns the bytes of static shared and local memory."""
        named = set(re.findall(r"[A-Za-z_$][\w$]*", " ".join(s.text for s in self.kernel.statements)))
        variables = [v for v in (*module.variables.values(), *self.kernel.variables.values()) if v.name in named]
        used = {"shared": 0, "local": 0, "param": 0}
        for v in sorted(variables, key=lambda v: v.size == 0):  # dynamic shared memory lies behind the static one
            if v.space in ("global", "const"):
                self.globals.append(v)
                self.symbols[v.name] = len(self.globals) << RANGE_BITS
            else:
                self.symbols[v.name] = _align(used[v.space], max(v.align, 16 if v.size == 0 else 1))
                used[v.space] = self.symbols[v.name] + v.size
        offset = 0
        for v in self.kernel.params:
            self.symbols[v.name] = offset = _align(offset, v.align)
            offset += v.size
        return used["shared"], _align(used["local"], 16)

    def run(self) -> LoweredKernel:
        statements = self.kernel.statements
        joins = reconvergence(self.successors())
        for index, statement in enumerate(statements):
            try:
                self.join = joins.get(index, -1)
                self.statement(statement)
            except (Unsupported, KeyError, ValueError, IndexError) as error:
                why = f" ({error})" if isinstance(error, Unsupported) else ""
                raise Unsupported(f"{statement.text}, PTX line {statement.line} of {self.kernel.name}{why}") from error
        self.rows.append(self.row("exit", [], ""))  # for a body that ends without ret
        return LoweredKernel(
            self.kernel.name,
            self.kernel.params,
            statements,
            np.array(self.rows, dtype=INSTRUCTION),
            self.size,
            [(offset, width, value) for (value, width), offset in self.constants.items()],
            self.specials,
            self.static_shared,
            self.local_bytes,
            self.globals,
            self.kernel.threads,
        )

    def successors(self) -> list[list[int]]:
        result = []
        for index, s in enumerate(self.kernel.statements):
            base = s.opcode.split(".")[0]
            following = [index + 1] if s.guard or base not in ("bra", "ret", "exit", "trap") else []
            if base == "bra":
                if s.operands[-1] not in self.kernel.labels:
                    raise Unsupported(f"{s.text}, PTX line {s.line}: no such label")
                following.append(self.kernel.labels[s.operands[-1]])
            elif base in ("ret", "exit", "trap"):
                following.append(len(self.kernel.statements))
            result.append(following)
        return result

    def statement(self, s: Statement) -> None:
        tokens = s.opcode.split(".")
        least, most = OPERANDS[tokens[0]]
        if not least <= len(s.operands) <= most:
            raise Unsupported(f"{len(s.operands)} operands")
        special = getattr(self, f"lower_{tokens[0]}", None)
        name, operands, mods = special(s, tokens) if special else self.regular(s, tokens)
        self.rows.append(self.row(name, operands, s.guard, mods))

    def row(self, name: str, operands: Sequence[int], guard: str, mods: int = 0) -> tuple:
        op = self.lookup(name, mods)
        if op < 0:
            raise Unsupported(f"no operation {name} with these modifiers")
        where, flip = self.predicate(guard) if guard else (-1, 0)
        return op, where, flip & 0xFFFFFFFF, mods, (*operands, *[0] * (20 - len(operands)))

    # Operands

    def allocate(self, width: int) -> int:
        """width: bytes a lane; 0 for a predicate, which is one mask of 4 bytes."""
        offset = self.size
        self.size += _align(width * LANES or 4, 64)
        return offset

    def register(self, name: str, width: int) -> int:
        actual = SIZES[self.kernel.registers[name]]
        if actual != width:
            raise Unsupported(f"{name} is {actual} bytes wide, the operation takes {width}")
        if name not in self.registers:
            self.registers[name] = self.allocate(width)
        return self.registers[name]

    def constant(self, value: int, width: int) -> int:
        bits = 8 * (width or 4)
        value &= (1 << bits) - 1
        value -= (value >> 63) << 64 if bits == 64 else 0
        if (value, width) not in self.constants:
            self.constants[value, width] = self.allocate(width)
        return self.constants[value, width]

    def operand(self, text: str, width: int) -> int:
        """The offset of a register, or of a constant's copy in every lane."""
        if text in self.kernel.registers:
            return self.register(text, width)
        if text == "_":
            return self.allocate(width)
        if text.startswith("%"):
            if width != 4:
                raise Unsupported(f"{text} as {width} bytes")
            return self.specials[text[1:]]
        if text in self.symbols:
            return self.constant(self.symbols[text], width)
        return self.constant(immediate(text), width)

    def predicate(self, text: str) -> tuple[int, int]:
        """Its offset, and all ones if it is negated."""
        flip = -1 if text.startswith("!") else 0
        name = text.lstrip("!")
        if name in self.kernel.registers or name == "_":
            return self.operand(name, 0), flip
        return self.constant(-bool(immediate(name)), 0), flip

    def vector(self, text: str) -> list[str]:
        return [part.strip() for part in text.strip("{} ").split(",")]

    def registers_of(self, text: str, count: int) -> list[int]:
        """The offsets of a vector of ``count`` registers of 4 bytes."""
        return [self.operand(part, 4) for part, _ in zip(self.vector(text), range(count), strict=True)]

    def address(self, text: str) -> list[int]:
        """[base], [base + 4], [base+-4]: base register, its bytes, offset."""
        match = re.fullmatch(r"\[\s*(?P<base>[^+\s]+)\s*(?:\+\s*(?P<offset>-?\w+))?\s*\]", text)
        if not match:
            raise Unsupported(f"address {text}")
        base, offset = match["base"], immediate(match["offset"]) if match["offset"] else 0
        if base in self.kernel.registers:
            width = SIZES[self.kernel.registers[base]]
            return [self.register(base, width), width, offset]
        return [self.operand(base, 8), 8, offset]

    # Operations whose operands all have one type

    def regular(self, s: Statement, tokens: list[str]) -> Row:
        names, mods = _modifiers(tokens)
        width = SIZES[names[-1]]
        exceptions = WIDTHS.get(".".join(names[:2])) or WIDTHS.get(names[0]) or {}
        operands: list[int] = []
        for position, text in enumerate(s.operands):
            if names[-1] == "pred":
                operands += self.predicate(text)[: 1 if position == 0 else 2]
            else:
                operands.append(self.operand(text, exceptions.get(position, width) or 2 * width))
        return ".".join(names), operands, mods

    def lower_mov(self, s: Statement, tokens: list[str]) -> Row:
        target, source = s.operands
        width = SIZES[tokens[1]]
        if tokens[1] == "pred":
            where, flip = self.predicate(source)
            return "mov.pred", [self.predicate(target)[0], where, flip, where, flip], 0
        if not (target.startswith("{") or source.startswith("{")):
            return self.regular(s, tokens)
        unpack = target.startswith("{")
        parts = self.vector(target if unpack else source)
        part = width // len(parts)
        offsets = [self.operand(p, part) for p in parts]
        name = f"{'unpack' if unpack else 'pack'}.{8 * part}.{8 * width}"
        return name, [len(parts), self.operand(source if unpack else target, width), *offsets], 0

    def lower_not(self, s: Statement, tokens: list[str]) -> Row:
        if tokens[1] != "pred":
            return self.regular(s, tokens)
        where, flip = self.predicate(s.operands[1])
        return "not.pred", [self.predicate(s.operands[0])[0], where, ~flip, where, ~flip], 0

    def lower_selp(self, s: Statement, tokens: list[str]) -> Row:
        width = SIZES[tokens[1]]
        return s.opcode, [*(self.operand(o, width) for o in s.operands[:3]), *self.predicate(s.operands[3])], 0

    def lower_setp(self, s: Statement, tokens: list[str]) -> Row:
        names, mods = _modifiers(tokens)
        width = SIZES[names[-1]]
        p, _, q = s.operands[0].partition("|")
        combination = COMBINATIONS[names[2]] if len(names) == 4 else 0
        third = self.predicate(s.operands[3]) if combination else (0, 0)
        sources = [self.operand(o, width) for o in s.operands[1:3]]
        results = [self.operand(p, 0), self.operand(q, 0) if q else -1]
        return f"setp.{names[-1]}", [*results, *sources, COMPARISONS[names[1]], combination, *third], mods

    def lower_cvt(self, s: Statement, tokens: list[str]) -> Row:
        names, mods = _modifiers(tokens)
        if names[1] in ("f16x2", "bf16x2", "tf32"):
            sources = 1 if names[1] == "tf32" else 2
            return (
                ".".join(names),
                [self.operand(o, 4) for o, _ in zip(s.operands, range(1 + sources), strict=True)],
                mods,
            )
        widths = [
            SIZES[self.kernel.registers[o]] if o in self.kernel.registers else 4 if o.startswith("%") else SIZES[kind]
            for o, kind in zip(s.operands, names[1:], strict=True)
        ]
        target, source = (self.operand(o, w) for o, w in zip(s.operands, widths, strict=True))
        return ".".join(names), [target, widths[0], source, widths[1]], mods

    # Memory

    def access(self, s: Statement, tokens: list[str], address: str, value: str) -> Row:
        kind = tokens[-1]
        unknown = [t for t in tokens[1:-1] if not CACHING.fullmatch(t) and t not in STRONG]
        if unknown:
            raise Unsupported("." + ".".join(unknown))
        space = next((t.split("::")[0] for t in tokens if t.split("::")[0] in WINDOWS), "")
        values = self.vector(value)
        named = [SIZES[self.kernel.registers[v]] for v in values if v in self.kernel.registers]
        width = named[0] if named else max(SIZES[kind], 2)
        strong = not STRONG.isdisjoint(tokens)
        fields = [SIZES[kind], len(values), width, kind[0] == "s", strong]
        operands = [*self.address(address), *map(int, fields), *(self.operand(v, width) for v in values)]
        return ".".join(filter(None, (tokens[0], space))), operands, 0

    def lower_ld(self, s: Statement, tokens: list[str]) -> Row:
        return self.access(s, tokens, s.operands[1], s.operands[0])

    def lower_st(self, s: Statement, tokens: list[str]) -> Row:
        if tokens[1] == "param":  # an argument of a call, and all calls but a failed assert's are refused
            return "membar", [], 0
        return self.access(s, tokens, s.operands[0], s.operands[1])

    def lower_cp(self, s: Statement, tokens: list[str]) -> Row:
        if tokens[1:3] == ["async", "commit_group"] or tokens[1:3] == ["async", "wait_all"]:
            return s.opcode, [], 0
        if tokens[1:3] == ["async", "wait_group"]:
            return s.opcode, [immediate(s.operands[0])], 0
        if tokens[:2] != ["cp", "async"] or tokens[2] not in ("ca", "cg"):
            raise Unsupported("a form of copy")
        hinted = "L2::cache_hint" in tokens
        rest = s.operands[3 : len(s.operands) - hinted]
        read = self.operand(rest[0], 4) if rest else -1
        size = immediate(s.operands[2])
        return "cp.async", [*self.address(s.operands[0]), *self.address(s.operands[1]), size, read], 0

    def lower_cvta(self, s: Statement, tokens: list[str]) -> Row:
        to_generic = tokens[1] != "to"
        space = tokens[1 if to_generic else 2].split("::")[0]
        return "cvta", [*(self.operand(o, 8) for o in s.operands), int(to_generic), WINDOWS[space]], 0

    def lower_isspacep(self, s: Statement, tokens: list[str]) -> Row:
        return "isspacep", [self.operand(s.operands[0], 0), self.operand(s.operands[1], 8), WINDOWS[tokens[1]]], 0

    def lower_atom(self, s: Statement, tokens: list[str]) -> Row:
        kind, width = tokens[-1], SIZES[tokens[-1]]
        names = [t for t in tokens[1:-1] if not CACHING.fullmatch(t) and t not in STRONG | {"acq_rel", "noftz"}]
        space = next((t.split("::")[0] for t in tokens if t.split("::")[0] in WINDOWS), "")
        result, rest = (-1, s.operands) if tokens[0] == "red" else (self.operand(s.operands[0], width), s.operands[1:])
        sources = [self.operand(o, width) for o in rest[1:]]
        operands = [result, *self.address(rest[0]), WINDOWS[space], *sources, *[-1] * (2 - len(sources))]
        return f"atom.{'.'.join(names)}.{kind}", operands, 0

    lower_red = lower_atom

    # Control, barriers and collectives

    def lower_bra(self, s: Statement, tokens: list[str]) -> Row:
        return "bra", [self.kernel.labels[s.operands[-1]], self.join], 0

    def lower_ret(self, s: Statement, tokens: list[str]) -> Row:
        return tokens[0], [], 0

    lower_exit = lower_trap = lower_ret

    def lower_call(self, s: Statement, tokens: list[str]) -> Row:
        if "__assertfail" not in s.operands:
            raise Unsupported("a call")
        return "assert", [], 0

    def ordering(self, s: Statement, tokens: list[str]) -> Row:
        return tokens[0], [], 0

    lower_membar = lower_fence = lower_nanosleep = lower_prefetch = ordering

    def lower_createpolicy(self, s: Statement, tokens: list[str]) -> Row:
        return "mov.b64", [self.operand(s.operands[0], 8), self.constant(0, 8)], 0

    def lower_bar(self, s: Statement, tokens: list[str]) -> Row:
        if tokens[1:3] == ["warp", "sync"]:
            return s.opcode, [self.operand(s.operands[0], 4)], 0
        kind = next(t for t in tokens if t in ("sync", "arrive", "red"))
        if kind != "red":
            return f"bar.{kind}", [self.operand(s.operands[0], 4), *self.thread_count(s.operands[1:])], 0
        which = ("popc", "and", "or").index(next(t for t in tokens if t in ("popc", "and", "or")))
        result = self.operand(s.operands[0], 0 if which else 4)
        barrier = [self.operand(s.operands[1], 4), *self.thread_count(s.operands[2:-1])]
        return "bar.red", [result, which, *barrier, *self.predicate(s.operands[-1])], 0

    lower_barrier = lower_bar

    def thread_count(self, operands: list[str]) -> list[int]:
        return [self.operand(operands[0], 4) if operands else -1]

    def lower_shfl(self, s: Statement, tokens: list[str]) -> Row:
        result, _, inside = s.operands[0].partition("|")
        sources = [self.operand(o, 4) for o in s.operands[1:]]
        return s.opcode, [self.operand(result, 4), self.operand(inside, 0) if inside else -1, *sources], 0

    def lower_vote(self, s: Statement, tokens: list[str]) -> Row:
        result, condition, members = s.operands
        operands = [self.operand(result, SIZES[tokens[-1]]), *self.predicate(condition), self.operand(members, 4)]
        return s.opcode, operands, 0

    # Tensor cores

    def lower_ldmatrix(self, s: Statement, tokens: list[str]) -> Row:
        names = [t for t in tokens if t not in ("sync", "aligned", "shared", "shared::cta")]
        count = int(names[2].removeprefix("x"))
        return ".".join(names), [*self.address(s.operands[1]), *self.registers_of(s.operands[0], count)], 0

    def lower_mma(self, s: Statement, tokens: list[str]) -> Row:
        if tokens[1:3] != ["sync", "aligned"] or tokens[4:6] != ["row", "col"]:
            raise Unsupported("a form of mma")
        bits, k = 32 if tokens[7] == "tf32" else 16, int(tokens[3].split("k")[1])
        counts = (4, k * bits // 64, k * bits // 128, 4)  # registers of D, A, B, C
        operands = [offset for o, n in zip(s.operands, counts, strict=True) for offset in self.registers_of(o, n)]
        return f"mma.{tokens[3]}.{'.'.join(tokens[6:])}", operands, 0


def _modifiers(tokens: list[str]) -> tuple[list[str], int]:
    """The tokens that name the operation, and the bits of the others."""
    names = [t for t in tokens if t not in MODS]
    return names, sum(MODS[t] for t in tokens if t in MODS)


def _align(value: int, to: int) -> int:
    return -(-value // to) * to
