"""Registers, spills and instructions of a kernel's compiled code.

NVIDIA: the cubin, through ``cuobjdump``, which comes with Triton. AMD: the assembly text that Triton keeps.
"""

import hashlib
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NVIDIA_MATRIX = ("HMMA", "IMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")

# "/*0a10*/  @!UP1 LDG.E.128.CONSTANT R4, ..." : the opcode and its dotted suffixes, after an optional predicate.
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)", re.MULTILINE)
_USAGE = re.compile(r"\bREG:\d+ STACK:\d+")
_AMD_MEMORY = re.compile(r"^(?:global|buffer)_(load|store)_(?:lds_)?(\w+)")
_AMD_BITS = {"dwordx4": 128, "dwordx3": 64, "dwordx2": 64}  # x3 counts as the next lower power of two


@dataclass(frozen=True)
class Code:
    """Counts of one kernel's machine code.

    Attributes:
        registers: per thread (AMD: VGPRs; AGPRs come on top where the kernel uses them).
        spills: NVIDIA: local loads and stores (LDL + STL) in the code. AMD: spilled VGPRs.
        stack: bytes per thread.
        instructions: without the NOPs that pad the end.
        matrix: matrix instructions by opcode.
        loads, stores: global accesses by opcode and bits, ``{"LDG.128": 4, "UTMALDG": 1}``; narrower than 64 is ``32``.
        waves: AMD only: waves per SIMD that the registers allow, as the compiler prints it.
    """

    registers: int
    spills: int
    stack: int
    instructions: int
    matrix: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    waves: int = 0


def read_code(asm: Mapping[str, str | bytes]) -> Code:
    """``asm`` of a Triton ``CompiledKernel`` (with ``cubin`` or ``amdgcn``) -> its counts."""
    return _read_cubin(asm["cubin"]) if "cubin" in asm else read_amdgcn(asm["amdgcn"])


known: dict[bytes, Code] = {}  # digest of a cubin -> its counts: disassembling takes as long as compiling


def _read_cubin(cubin: bytes) -> Code:
    key = hashlib.sha256(cubin).digest()
    if key not in known:
        known[key] = read_sass(dump(cubin))
    return known[key]


def read_together(cubins: Iterable[bytes], arch: int) -> None:
    """Disassemble many kernels of one chip in one process; ``read_code`` of them then answers at once.

    The disassembler takes half a second to start, and hundredths of one for a kernel.

    Args:
        cubins: as Triton compiles them.
        arch: the chip's compute capability, 90 for sm_90.
    """
    new = {hashlib.sha256(cubin).digest(): cubin for cubin in cubins}
    codes = {key: _instructions(cubin) for key, cubin in new.items() if key not in known}
    if not codes:
        return
    chip = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
    raw = _run(CUOBJDUMP.with_name("nvdisasm"), "-ndf", "-b", chip, content=b"".join(codes.values()))
    place = address = 0
    for key, code in codes.items():
        address += len(code)
        after = re.compile(rf"^\s*/\*{address:04x}\*/", re.MULTILINE).search(raw, place)
        end = after.start() if after else len(raw)
        usage = _USAGE.search(_run(CUOBJDUMP, "-res-usage", content=new[key]))
        known[key] = read_sass(f"{usage[0] if usage else ''}\n{raw[place:end]}")
        place = end


def _instructions(cubin: bytes) -> bytes:
    """The machine code in a 64-bit ELF file: its sections ``.text.*``, one after another."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]  # name, .., offset, bytes
    named = lambda section: cubin.startswith(b".text.", sections[names][4] + section[0])
    return b"".join(cubin[one[4] : one[4] + one[5]] for one in sections if named(one))


def dump(cubin: bytes) -> str:
    """Resource usage and SASS of ``cubin``, as text."""
    return _run(CUOBJDUMP, "-res-usage", "-sass", content=cubin)


def _run(program: Path, *options: str, content: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        command = [str(program), *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"dump: {' '.join(command)} failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def read_sass(text: str) -> Code:
    """The output of ``cuobjdump -res-usage -sass`` -> counts."""
    opcodes, loads, stores = Counter(), Counter(), Counter()
    for opcode, suffixes in _SASS.findall(text):
        opcodes[opcode] += 1
        if opcode in ("UTMALDG", "UTMASTG"):  # one instruction copies a whole tile
            (loads if opcode == "UTMALDG" else stores)[opcode] += 1
        elif opcode in ("LDG", "LDGSTS"):
            loads[f"{opcode}.{_sass_bits(suffixes)}"] += 1
        elif opcode in ("STG", "RED", "REDG", "ATOMG"):
            stores[f"{opcode}.{_sass_bits(suffixes)}"] += 1
    return Code(
        registers=_number(r"\bREG:(\d+)", text),
        spills=opcodes["LDL"] + opcodes["STL"],
        stack=_number(r"\bSTACK:(\d+)", text),
        instructions=opcodes.total() - opcodes["NOP"],
        matrix={name: opcodes[name] for name in NVIDIA_MATRIX if opcodes[name]},
        loads=dict(loads),
        stores=dict(stores),
    )


def _sass_bits(suffixes: str) -> int:
    return next((bits for bits in (256, 128, 64) if str(bits) in suffixes.split(".")), 32)


def read_amdgcn(text: str) -> Code:
    """AMD assembly with its metadata comments -> counts."""
    opcodes, loads, stores = Counter(), Counter(), Counter()
    for line in text.splitlines():
        words = line.split()
        if not words or not line[0].isspace() or not re.match(r"(?:[sv]|ds|global|buffer|flat)_\w+$", words[0]):
            continue
        opcodes[words[0]] += 1
        if access := _AMD_MEMORY.match(words[0]):
            name = words[0].split("_")[0] + "_" + access[1]
            (loads if access[1] == "load" else stores)[f"{name}.{_AMD_BITS.get(access[2], 32)}"] += 1
    return Code(
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spills=_number(r"\.vgpr_spill_count:\s+(\d+)", text),
        stack=_number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        instructions=opcodes.total() - opcodes["s_nop"],
        matrix={"v_mfma": sum(n for name, n in opcodes.items() if name.startswith("v_mfma"))},
        loads=dict(loads),
        stores=dict(stores),
        waves=_number(r"; Occupancy: (\d+)", text),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(
            f"read_code: no {pattern!r} in the disassembly; its format has changed, adapt kernels/tools/machine_code.py"
        )
    return int(found[1])
