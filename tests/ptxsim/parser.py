"""PTX text to statements: what is declared, and each kernel's instructions with their operands as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.ptxsim.faults import Unsupported

SIZES = {"pred": 0} | {f"{kind}{bits}": bits // 8 for kind in "bsuf" for bits in (8, 16, 32, 64)}
SIZES |= {"f16x2": 4, "bf16": 2, "bf16x2": 4, "tf32": 4}


@dataclass(frozen=True)
class Variable:
    """A .param, .shared, .local, .global or .const variable. size: bytes, 0 for an array of unknown length."""

    name: str
    space: str
    type: str
    size: int
    align: int
    data: bytes = b""


@dataclass(frozen=True)
class Statement:
    """One instruction. opcode: with its dots ("ld.global.u32"). source: file and line, of the innermost inlined call."""

    line: int
    source: tuple[str, int]
    guard: str
    opcode: str
    operands: list[str]
    text: str


@dataclass
class KernelText:
    name: str
    params: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)  # name (unique, after scoping) to type
    variables: dict[str, Variable] = field(default_factory=dict)  # .shared and .local of its body
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # to an index into statements
    threads: tuple[int, int] = (1, 1024)  # the least and the most a block may have


@dataclass
class ModuleText:
    """Bodies are parsed when they are asked for: a module may hold many long kernels."""

    target: str
    files: dict[int, str]
    entries: dict[str, tuple[KernelText, str, int]] = field(default_factory=dict)  # a head, its body, the body's line
    variables: dict[str, Variable] = field(default_factory=dict)  # .global, .const and .shared of the module

    def kernel(self, name: str) -> KernelText:
        kernel, body, line = self.entries[name]
        if not kernel.statements:
            _Body(kernel, self.files).parse(body, line)
        return kernel


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_STRING = r'"(?:[^"\\]|\\.)*"'
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(?P<space>param|shared|local|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?(?P<name>[\w$]+)\s*(?P<dims>(?:\[\s*\d*\s*\])*)"
    r"(?:\s*=\s*(?P<value>.*))?$",
    re.DOTALL,
)
_FILE = re.compile(r'\.file\s+(\d+)\s+"((?:[^"\\]|\\.)*)"')
_SKIPPED_LINE = re.compile(r"\s*\.(?:version|target|address_size|file|loc)\b[^\n]*")
_ITEM = re.compile(  # of a body; braces of vectors and calls lie inside statements
    r"\s*(?:(?P<loc>\.loc\s[^\n]*)|(?P<open>\{)|(?P<close>\})|(?P<label>[\w$%]+)\s*:(?!:)|(?P<statement>[^;]+);)"
)
_INSTRUCTION = re.compile(r"(?:@\s*(?P<guard>!?\s*[\w$%]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)$", re.DOTALL)
_IDENTIFIER = re.compile(r"(?<![\w.%$])(?:%[\w$]+|[A-Za-z_$][\w$]*)")
_NUMBERED = re.compile(r"(.*?\D)(\d+)$")


def parse(text: str) -> ModuleText:
    """A module's declarations and kernels; raises Unsupported for device functions that are not inlined."""
    text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)
    files = {int(number): name for number, name in _FILE.findall(text)}
    target = re.search(r"\.target\s+(\w+)", text)
    module = ModuleText(target.group(1) if target else "", files)
    for line, head, body in _top_level(text):
        if ".entry" in head:
            kernel = _parse_head(head)
            module.entries[kernel.name] = kernel, body, line
        elif re.match(r"(\.\w+\s+)*\.func\b", head):
            if body:
                raise Unsupported(
                    f"a device function that is not inlined, PTX line {line}: {head.split('(')[0].strip()}"
                )
        elif variable := _parse_variable(head + body):
            module.variables[variable.name] = variable
    return module


def _top_level(text: str) -> Iterator[tuple[int, str, str]]:
    """(line of the body, head, body) of each declaration outside of functions; body keeps its outer braces."""
    position = 0
    while True:
        while skipped := _SKIPPED_LINE.match(text, position):
            position = skipped.end()
        stop = re.compile(r"[;{]").search(text, position)
        if not stop:
            return
        head, body, end = text[position : stop.start()].strip(), "", stop.end()
        if stop.group() == "{":
            end = _closing(text, stop.start())
            body = text[stop.start() : end]
        yield text.count("\n", 0, stop.start()) + 1, head, body
        position = end
        if body and (semicolon := re.compile(r"\s*;").match(text, position)):
            position = semicolon.end()


def _closing(text: str, start: int) -> int:
    """The end of the braces that open at ``start``."""
    depth = 0
    for brace in re.compile(rf"{_STRING}|[{{}}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.end()
    raise Unsupported("PTX with a brace that nobody closes")


def _parse_variable(declaration: str) -> Variable | None:
    match = _VARIABLE.match(" ".join(declaration.split()))
    if not match:
        return None
    element = SIZES[match["type"]]
    size = element
    for length in re.findall(r"\[\s*(\d*)\s*\]", match["dims"]):
        size *= int(length or 0)
    data = b""
    if match["value"]:
        items = re.findall(r"[^{},\s]+", match["value"])
        data = b"".join(_initial(item, match["type"], element) for item in items).ljust(size, b"\0")
    align = int(match["align"] or element)
    return Variable(match["name"], match["space"], match["type"], size, align, data)


def _initial(item: str, kind: str, size: int) -> bytes:
    if not re.fullmatch(r"-?(0[xX][\da-fA-F]+|\d+)U?|0[fdFD][\da-fA-F]+", item):
        raise Unsupported(f"an initial value that is no number: {item}")
    return (immediate(item) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def immediate(text: str) -> int:
    """The bits of a number in PTX: 0f and 0d are floats in hexadecimal."""
    if re.match(r"0[fFdD]", text):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0) if not re.fullmatch(r"-?0\d+", text) else int(text, 8)


def _parse_head(head: str) -> KernelText:
    match = re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?\s*(?=\.|$)", head + " ", re.DOTALL)
    if not match:
        raise Unsupported(f"an entry of unknown form: {head}")
    params = []
    for declaration in filter(str.strip, (match[2] or "").split(",")):
        variable = _parse_variable(declaration.strip())
        if not variable:
            raise Unsupported(f"a parameter of unknown form: {declaration.strip()}")
        params.append(variable)
    least, most = 1, 1024
    for directive, shape in re.findall(r"\.(reqntid|maxntid)\s+(\d+(?:\s*,\s*\d+)*)", head):
        most = min(most, math.prod(map(int, shape.split(","))))
        least = most if directive == "reqntid" else least
    return KernelText(match[1], params, threads=(least, most))


@dataclass
class _Scope:
    """A pair of braces. Inline assembly repeats names in braces of its own, so nested names get the scope's number."""

    number: int
    registers: dict[str, str] = field(default_factory=dict)  # declared name to type
    ranges: dict[str, str] = field(default_factory=dict)  # prefix of "%r<9>" to type

    def unique(self, name: str) -> str:
        return f"{name}#{self.number}" if self.number > 1 else name

    def type_of(self, name: str) -> str | None:
        if name in self.registers:
            return self.registers[name]
        numbered = _NUMBERED.match(name)
        return self.ranges.get(numbered[1]) if numbered else None


class _Body:
    """Walks the body of one kernel."""

    def __init__(self, kernel: KernelText, files: dict[int, str]):
        self.kernel, self.files = kernel, files
        self.scopes: list[_Scope] = []
        self.scope_count = 0
        self.source = ("unknown", 0)
        self.branches: list[tuple[int, list[int]]] = []  # statements that name labels, and the scopes around them

    def parse(self, body: str, line: int) -> None:
        position, counted = 0, 0
        while item := _ITEM.match(body, position):
            start = item.start(item.lastgroup or 0)
            line += body.count("\n", counted, start)
            position, counted = item.end(), start
            if item["loc"]:
                number, row = item["loc"].split()[1:3]
                self.source = (self.files.get(int(number), "unknown"), int(row))
            elif item["open"]:
                self.scope_count += 1
                self.scopes.append(_Scope(self.scope_count))
            elif item["close"]:
                self.scopes.pop()
            elif item["label"]:
                self.kernel.labels[self.scopes[-1].unique(item["label"])] = len(self.kernel.statements)
            elif item["statement"].startswith("."):
                self._directive(" ".join(item["statement"].split()), line)
            else:
                self._instruction(" ".join(item["statement"].split()), line)
        if rest := body[position:].lstrip():
            line += body.count("\n", counted, len(body) - len(rest))
            raise Unsupported(f"{' '.join(rest.split())[:80]}, PTX line {line}")
        for index, numbers in self.branches:
            operands = self.kernel.statements[index].operands
            names = [_Scope(number).unique(operands[-1]) for number in reversed(numbers)]
            operands[-1] = next((name for name in names if name in self.kernel.labels), operands[-1])

    def _directive(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            kind, names = text.split(None, 2)[1:]
            for name in names.split(","):
                ranged = re.fullmatch(r"\s*([\w$%]+)<\d+>\s*", name)
                target = self.scopes[-1].ranges if ranged else self.scopes[-1].registers
                target[ranged[1] if ranged else name.strip()] = kind.removeprefix(".")
        elif variable := _parse_variable(text):
            self.kernel.variables[variable.name] = variable
        elif not text.startswith(".pragma"):
            raise Unsupported(f"{text}, PTX line {line}")

    def _instruction(self, text: str, line: int) -> None:
        match = _INSTRUCTION.match(text)
        if not match:
            raise Unsupported(f"{text}, PTX line {line}")
        opcode, operands = match["opcode"], _split(match["operands"])
        if opcode.startswith("bra"):
            self.branches.append((len(self.kernel.statements), [scope.number for scope in self.scopes]))
        else:
            operands = [_IDENTIFIER.sub(self._resolve, operand) for operand in operands]
        guard = _IDENTIFIER.sub(self._resolve, (match["guard"] or "").replace(" ", ""))
        self.kernel.statements.append(Statement(line, self.source, guard, opcode, operands, text))

    def _resolve(self, match: re.Match[str]) -> str:
        """The unique name of a register; other identifiers stay."""
        name = match.group()
        for scope in reversed(self.scopes):
            if kind := scope.type_of(name):
                unique = scope.unique(name)
                self.kernel.registers[unique] = kind
                return unique
        return name


def _split(operands: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(operands):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(operands[start:position].strip())
            start = position + 1
    return [*parts, operands[start:].strip()] if operands.strip() else []
