"""Rewrites device code, which the C++ compiler has preprocessed, into what it can compile.

`asm` statements become calls of the functions of ptx.h, one an instruction, and the declarations of `__shared__`
variables references into the emulated memory. Everything else is C++ already.
"""

from __future__ import annotations

import ast
import re

_ASM = re.compile(r"\basm(?:\s+volatile)?\s*\(")
_SHARED = re.compile(r"(?P<extern>\bextern\s+)?\b__shared__\s+(?P<rest>[^;]*);")
_ALIGNED = re.compile(r"__attribute__\s*\(\(aligned\((?P<bytes>[^()]*)\)\)\)")
_DECLARATOR = re.compile(r"(?P<type>.*?)\b(?P<name>\w+)\s*(?P<sizes>(?:\[[^\]]*\]\s*)*)$", re.S)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


# GCC 12 fails (an internal error in lookup_template_class) where the bound of an array in a lambda depends on a
# constant of the function around it.
_AVOIDED = {"[kStrict ?": "[M == Math::kFloat32 ?"}


def rewrite(text: str) -> str:
    for found, instead in _AVOIDED.items():
        text = text.replace(found, instead)
    return _SHARED.sub(_shared, _without_asm(text))


def _without_asm(text: str) -> str:
    parts, end = [], 0
    while found := _ASM.search(text, end):
        close = _closing(text, found.end())
        parts += [text[end : found.start()], statement(text[found.end() : close])]
        # The line numbers behind it stay right.
        parts.append("\n" * text.count("\n", found.start(), close))
        end = close + 1
    return "".join(parts) + text[end:]


def _closing(text: str, start: int) -> int:
    """Of the parenthesis before `start`; strings hold none that count."""
    depth, at = 1, start
    while True:
        if text[at] == '"':
            at = _STRING.match(text, at).end()  # type: ignore[union-attr]
            continue
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
        at += 1


def _split(text: str, separator: str, opening: str = "([{", closing: str = ")]}") -> list[str]:
    """At the separators outside of brackets and strings."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        if text[at] == '"':
            at = _STRING.match(text, at).end()  # type: ignore[union-attr]
            continue
        if text[at] in opening:
            depth += 1
        elif text[at] in closing:
            depth -= 1
        elif text[at] == separator and depth == 0:
            parts.append(text[start:at])
            start = at + 1
        at += 1
    return [*parts, text[start:]]


def statement(text: str) -> str:
    """The C++ of what stands between the parentheses of an asm statement."""
    template, *sections = _split(text, ":")
    operands = []
    for section in sections[:2]:
        for operand in _split(section, ","):
            if operand.strip():
                constraint, _, expression = operand.strip().partition("(")
                operands.append("(" + expression)
    code = "".join(ast.literal_eval(s) for s in _STRING.findall(template))
    found = []
    for part in code.split(";"):
        part = part.strip()
        while part[:1] == "{":  # the scope of a register
            part = part[1:].strip()
        if part and part != "}":
            found.append(_instruction(part, operands))
    return "do { " + " ".join(found) + " } while (false)"


def _instruction(text: str, operands: list[str]) -> str:
    declared = re.fullmatch(r"\.reg\s+\.pred\s+(\w+)", text)
    if declared:
        return f"bool {declared[1]};"
    guard, text = re.fullmatch(r"(?:@(!?\w+)\s+)?(.*)", text, re.S).groups()  # type: ignore[union-attr]
    name, _, rest = text.partition(" ")
    given = [re.sub(r"%(\d+)", lambda m: operands[int(m[1])], o).strip() for o in re.split(r"[{}\[\],]", rest)]
    wanted = ", ".join(o for o in given if o not in ("", "_"))  # _ is a result that is not
    call = f"ai3_emulation::ptx::{re.sub(r'[^A-Za-z0-9]+', '_', name)}({wanted});"
    return f"if ({guard}) {call}" if guard else call


_declarations = 0


def _shared(match: re.Match[str]) -> str:
    global _declarations
    rest = match["rest"]
    alignments = [int(a["bytes"]) for a in _ALIGNED.finditer(rest)]
    alignment = max(alignments, default=1)
    first, *others = _split(_ALIGNED.sub("", rest), ",", "([{<", ")]}>")
    declarator = _DECLARATOR.fullmatch(first.strip())
    assert declarator is not None, match[0]
    kind = declarator["type"].strip()
    if match["extern"]:
        memory = f"ai3_emulation::dynamic_shared({alignment})"
        return f"{kind}* const {declarator['name']} = static_cast<{kind}*>({memory});"
    found = []
    for text in (first.strip()[len(declarator["type"]) :], *others):
        each = _DECLARATOR.fullmatch(text.strip())
        assert each is not None and not each["type"], match[0]
        _declarations += 1
        alias = f"Shared{_declarations}"
        found.append(f"using {alias} = {kind}; using Whole{alias} = {alias}{each['sizes'].strip()};")
        memory = f"ai3_emulation::static_shared<Whole{alias}, {_declarations}>({alignment})"
        found.append(f"Whole{alias}& {each['name']} = {memory};")
    return " ".join(found)
