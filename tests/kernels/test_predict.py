"""The static model of a launch's time, on planted listings and inputs worked out by hand; nothing is compiled."""

import json
from collections import Counter

import pytest
import torch
import triton

from fastseg.kernels.runtime.ceilings import CHIPS, Core
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.tools.predict import fresh, sass, warp
from fastseg.kernels.tools.predict.__main__ import HEAD, Old, page, write
from fastseg.kernels.tools.predict.model import Counts, seconds
from fastseg.kernels.tools.predict.program import SECTOR, Kernel, mean

H200 = CHIPS["H200"]


@triton.jit
def _inner(x):
    return x


@triton.jit
def _outer(x_ptr, n):
    _inner(x_ptr)


CORE = Core(alu=4, l2=200, shared=30, barrier=20)

# A loop over k (line 10) around a loop over rows (line 20), then a loop that ptxas unrolled four times (line 30).
ARGUMENTS = '%x: !tt.ptr<f16> loc("x"(#loc)), %y: !tt.ptr<f32> loc("y"(#loc)), %rows: i32 loc("rows"(#loc))'
TTIR = f"""
#loc = loc("/x/k.py":1:0)
#loc1 = loc("/x/k.py":10:0)
#loc2 = loc("/x/k.py":20:0)
#loc3 = loc("/x/k.py":30:0)
#loc4 = loc("/x/k.py":40:0)
module {{
  tt.func public @k({ARGUMENTS}) attributes {{noinline = false}} {{
    %c0 = arith.constant 0 : i32 loc(#loc)
    %c1 = arith.constant 1 : i32 loc(#loc)
    %c4 = arith.constant 4 : i32 loc(#loc)
    %c64 = arith.constant 64 : i32 loc(#loc)
    %c256 = arith.constant 256 : i32 loc(#loc)
    %pid = tt.get_program_id x : i32 loc(#loc)
    %first = arith.muli %pid, %c64 : i32 loc(#loc)
    %r = tt.make_range {{end = 64 : i32, start = 0 : i32}} : tensor<64xi32> loc(#loc)
    %at = tt.splat %first : i32 -> tensor<64xi32> loc(#loc)
    %offs = arith.addi %at, %r : tensor<64xi32> loc(#loc)
    %px = tt.splat %x : !tt.ptr<f16> -> tensor<64x!tt.ptr<f16>> loc(#loc)
    %end = tt.splat %rows : i32 -> tensor<64xi32> loc(#loc)
    %mask = arith.cmpi slt, %offs, %end : tensor<64xi32> loc(#loc)
    scf.for %k = %c0 to %c4 step %c1  : i32 {{
      %step = arith.muli %k, %c256 : i32 loc(#loc1)
      %ss = tt.splat %step : i32 -> tensor<64xi32> loc(#loc1)
      %oo = arith.addi %offs, %ss : tensor<64xi32> loc(#loc1)
      scf.for %j = %k to %c4 step %c1  : i32 {{
        %p = tt.addptr %px, %oo : tensor<64x!tt.ptr<f16>>, tensor<64xi32> loc(#loc2)
        %v = tt.load %p, %mask, %cst : tensor<64x!tt.ptr<f16>> loc(#loc2)
      }} loc(#loc2)
    }} loc(#loc1)
    %n = tt.load %y : !tt.ptr<f32> loc(#loc4)
    scf.for %i = %c0 to %c64 step %c1  : i32 {{
      %q = tt.addptr %y, %i : !tt.ptr<f32>, i32 loc(#loc3)
      tt.store %q, %w : !tt.ptr<f32> loc(#loc3)
    }} loc(#loc3)
    %odd = arith.cmpi eq, %pid, %c1 : i32 loc(#loc4)
    scf.if %odd {{
      tt.store %y, %w : !tt.ptr<f32> loc(#loc4)
    }} loc(#loc4)
    scf.for %m = %c0 to %n step %c1  : i32 {{
      %z = arith.addi %m, %c1 : i32 loc(#loc)
    }} loc(#loc)
    tt.return loc(#loc)
  }} loc(#loc)
}} loc(#loc)
"""
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
	//## File "/x/k.py", line 10
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_0:
	//## File "/x/k.py", line 20
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R8.64] ;
        /*0030*/                   FADD R5, R4, R5 ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
	//## File "/x/k.py", line 10
        /*0050*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
	//## File "/x/k.py", line 30
        /*0060*/                   STG.E desc[UR4][R8.64], R5 ;
        /*0070*/                   STG.E desc[UR4][R8.64], R5 ;
        /*0080*/                   STG.E desc[UR4][R8.64], R5 ;
        /*0090*/                   STG.E desc[UR4][R8.64], R5 ;
        /*00a0*/                   IADD3 R9, R9, 0x4, RZ ;
        /*00b0*/                   IADD3 R9, R9, 0x4, RZ ;
        /*00c0*/                   IADD3 R9, R9, 0x4, RZ ;
        /*00d0*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*00e0*/                   STG.E desc[UR4][R8.64], R5 ;
        /*00f0*/               @P1 BRA `(.L_x_3) ;
        /*0100*/                   EXIT ;
.L_x_4:
        /*0110*/                   BRA `(.L_x_4);
        /*0120*/                   NOP;
"""


def listing(text: str) -> sass.Listing:
    return sass.read(text)


def test_loops_of_the_code_nest_and_a_trap_is_none():
    found = listing(SASS)
    assert [(loop.first, loop.last) for loop in found.loops] == [(1, 5), (6, 13), (14, 15)]
    assert [(loop.first, loop.last) for loop in found.loops[0].inner] == [(2, 4)]
    assert sass.own(found.loops[0]) == [1, 5]
    assert found.instructions[2] == ("LDG", ("E", "128"), "R4, desc[UR4][R8.64]", "@!P0", "k.py:20")
    assert "NOP" not in {one.opcode for one in found.instructions}


def test_a_way_back_from_behind_the_end_is_no_loop():
    """A wait whose slow path stands behind the program: it comes back into the loop, and begins none."""
    body = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4], R5", "@!P0 BRA `(.slow)", ".back:", "FADD R2, R2, R2",
            "@P1 BRA `(.loop)", "EXIT", ".slow:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4], R5",
            "@!P0 BRA `(.slow)", "BRA `(.back)"]  # fmt: skip
    lines = ["MOV R1, R1", ".loop:", *body]
    text = "\n".join(line if line.endswith(":") else f"/*0000*/ {line} ;" for line in lines)
    assert [(loop.first, loop.last) for loop in listing(text).loops] == [(1, 4), (6, 7)]


def test_a_program_counts_trips_bytes_and_branches():
    """Program 1 of 4, 100 rows: its 64 lanes hold 36 of them, at four places 512 bytes apart."""
    work = Kernel(TTIR).work({"rows": 100}, (4,), 1)
    assert work.bodies == (4, 4 + 3 + 2 + 1, 64, 1) and work.assumed  # the last loop's end is in memory
    assert work.read["x"] == 4 * 3 * SECTOR  # 72 bytes from a multiple of 128 on
    assert work.written["y"] == pytest.approx(64 * 4, rel=0.5)  # eight trips are run, over two sectors
    assert work.requested == pytest.approx(10 * 36 * 2 + 4 + 64 * 4 + 4)
    assert work.loads == {"k.py:20": {"x"}, "k.py:40": {"y"}}
    other = Kernel(TTIR).work({"rows": 100}, (4,), 2)
    assert other.shares["k.py:40"] < 1 and "k.py:40" not in work.shares  # its branch is not taken
    assert other.read.get("x", 0) == 0 and mean([work, other]).read["x"] == 2 * 3 * SECTOR
    known = Kernel(TTIR).work({"rows": 100}, (4,), 1, {"m": 5})
    assert known.bodies[3] == 5 and known.assumed


def test_the_code_runs_as_often_as_the_loop_it_was_made_from():
    found, kernel = listing(SASS), Kernel(TTIR)
    assert sass.set_runs(found, kernel, (4, 10, 64, 1)) == []
    outer, unrolled, rest = found.loops
    assert (outer.runs, outer.inner[0].runs) == (4, 10)
    assert unrolled.runs == 64 / 4 and rest.runs == 1.5  # of at most three, half
    slots = warp.slots(found)
    assert slots.issued == 1 + 2 * 4 + 3 * 10 + 8 * 16 + 2 * 1.5 + 2
    assert (slots.fma, slots.alu) == (10, 4 + 3 * 16)
    assert slots.bytes == 10 * 512 + (4 * 16 + 1.5) * 128  # a narrow access takes a whole cycle of the port
    assert warp.slots(found, {"k.py:20": 0.5}).fma == 5


def test_the_first_loads_of_a_pipelined_loop_do_not_name_the_loop_around_it():
    """They stand in front of it, with its lines, and are run once where it runs often."""
    first = "/*0011*/ LDGSTS.E.128 [R4], desc[UR4][R8.64] ;\n" * 3
    found = listing(SASS.replace(".L_x_0:\n", f'//## File "/x/k.py", line 20\n{first}.L_x_0:\n'))
    assert sass.set_runs(found, Kernel(TTIR), (4, 10, 64, 1)) == []
    assert (found.loops[0].runs, found.loops[0].inner[0].runs) == (4, 10)


def test_a_loop_without_a_source_is_named():
    found = listing(SASS.replace("line 30", "line 31"))
    assert len(sass.set_runs(found, Kernel(TTIR), (4, 10, 64, 1))) == 2


def cycles(*code: str, product: float = 0.0, **memory: float) -> float:
    text = "\n".join(f"/*{i:04x}*/ {line} ;" for i, line in enumerate(code))
    return warp.alone(listing('//## File "k.py", line 1\n' + text), CORE, memory, product)


def test_loads_that_wait_for_nothing_overlap_and_a_chain_adds_up():
    load = "LDG.E R{}, desc[UR4][R{}.64]"
    one = cycles(load.format(4, 2), "FADD R8, R4, R4")
    assert one == 200 + 4
    assert cycles(load.format(4, 2), load.format(5, 2), "FADD R8, R4, R5") == one + 1
    assert cycles(load.format(4, 2), load.format(6, 4), "FADD R8, R6, R6") == 2 * one - 4
    assert cycles("LDG.E.128 R4, desc[UR4][R2.64]", "FADD R8, R7, R7") == one
    text = listing(f'//## File "k.py", line 1\n/*0000*/ {load.format(4, 2)} ;\n/*0010*/ FADD R8, R4, R4 ;')
    assert warp.alone(text, CORE, {"k.py:1": 39}) == 39 + 4


def test_copies_are_waited_for_by_group():
    copy, commit = "LDGSTS.E.128 [R4], desc[UR4][R2.64]", "LDGDEPBAR"
    both = cycles(copy, commit, copy, commit, "DEPBAR.LE SB0, 0x0")
    first = cycles(copy, commit, copy, commit, "DEPBAR.LE SB0, 0x1")
    assert (first, both) == (200 + 1, 202 + 1)
    assert cycles(copy, commit, "DEPBAR.LE SB0, 0x1") == 3


def test_products_keep_the_matrix_units_busy_one_after_the_other():
    hmma = "HMMA.16816.F32.BF16 R{0}, R20, R24, R{0}"
    assert cycles(hmma.format(4), hmma.format(8), product=40) == 80
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    hgmma = "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0"
    assert cycles(hgmma, wait, product=64) == 64 + CORE.wgmma_tail + 1
    assert cycles(hgmma, product=64) == 64 + CORE.wgmma_tail


def test_a_loop_repeats_its_second_trip():
    body = ["LDG.E R4, desc[UR4][R2.64]", "FADD R2, R4, R4"]
    text = "\n".join(["//## File \"k.py\", line 1", ".L_x_0:", *(f"/*{i:04x}*/ {b} ;" for i, b in enumerate(body)),
                      "/*0002*/ BRA `(.L_x_0) ;"])  # fmt: skip
    found = listing(text)
    found.loops[0].runs = 10
    assert warp.alone(found, CORE, {}) == pytest.approx(10 * (200 + 4), abs=10)


def test_registers_that_an_instruction_writes_and_reads():
    registers = lambda line: warp.registers(listing(f"/*0000*/ {line} ;").instructions[0])
    assert registers("LDG.E.64 R4, desc[UR4][R2.64+0x10]") == (["R4", "R5"], ["UR4", "R2"])
    assert registers("STG.E.128 desc[UR4][R2.64], R8") == ([], ["UR4", "R2", "R8"])
    assert registers("ISETP.GE.AND P0, PT, R5, UR4, PT") == ([], ["R5", "UR4"])
    assert registers("LDSM.16.M88.4 R52, [R60+UR9]") == (["R52", "R53", "R54", "R55"], ["R60", "UR9"])
    assert registers("IMAD.WIDE R4, R6, 0x2, R8") == (["R4", "R5"], ["R6", "R8"])


def counts(**changed) -> Counts:
    slots = warp.Slots(**{"issued": 0, "fma": 0, "heavy": 0, "alu": 0, "special": 0, "double": 0, "bytes": 0,
                          "matrix": Counter()} | changed.pop("slots", {}))  # fmt: skip
    base = {"programs": 1320, "warps": 4, "blocks": 4, "dram": 0, "l2": 0, "matrix": 0, "alone": 0}
    return Counts(**base | changed, slots=slots)


def test_a_copy_takes_its_bytes_over_the_bandwidth():
    terms = seconds(counts(dram=4.3e9, l2=4.3e9, slots={"issued": 20, "bytes": 4096}), H200)
    assert max(terms, key=terms.get) == "dram" and terms["dram"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "pipe, lanes",
    [("issued", 128), ("fma", 128), ("heavy", 64), ("alu", 64), ("special", 16), ("double", 64)],
)
def test_a_pipe_takes_its_slots_on_the_busiest_multiprocessor(pipe, lanes):
    """1320 programs of 4 warps: 10 on each of 132 multiprocessors; one more makes it 11."""
    name = {"issued": "issue", "heavy": "fma"}.get(pipe, pipe)
    of = lambda programs: seconds(counts(programs=programs, slots={pipe: 1000}), H200)
    assert of(1320)[name] == pytest.approx(1000 * 32 / lanes * 4 * 10 / H200.clock)
    assert of(1321)[name] == pytest.approx(of(1320)[name] * 1.1)
    assert max(of(1320), key=of(1320).get) == name


def test_latency_counts_waves():
    """528 programs run at once; the 1320 take three waves, however short the last."""
    terms = seconds(counts(alone=1977), H200)
    assert terms["latency"] == pytest.approx(3e-6)
    assert seconds(counts(alone=1977, blocks=10), H200)["latency"] == pytest.approx(1e-6)


def test_more_bytes_never_take_less():
    longest = [max(seconds(counts(dram=n, l2=2 * n, alone=10**5), H200).values()) for n in (0, 10**6, 10**8, 10**9)]
    assert longest == sorted(longest) and longest[-1] > longest[0]


def test_a_digest_follows_the_code_and_what_it_runs_on(monkeypatch):
    """Another chip, another shape, another device function: not the place in the file."""
    rows = lambda n: torch.empty(n, 4, device="meta")
    of = lambda n=8, chip=H200: fresh.digests(lambda: launch(_outer, (2,), rows(n), n, num_warps=4), chip)
    first = of()
    assert first == of() and len({*first, *of(9), *of(chip=CHIPS["A100"])}) == 3
    text = fresh.text_of
    for changed in (_outer, _inner):
        for new, same in (("def k(): 1", False), (f"# further down\n{text(changed)}", True)):
            fresh.source_of.cache_clear()
            monkeypatch.setattr(fresh, "text_of", lambda each, new=new, at=changed: new if each is at else text(each))
            assert (of() == first) == same
    fresh.source_of.cache_clear()


def test_only_rows_of_earlier_code_are_old(monkeypatch):
    monkeypatch.setattr(fresh, "digests", lambda fn, chip: ["a", "b"])
    rows = [{"case": "SegNet stage", "chip": "H200", "code": code} for code in "ab"]
    assert not Old(rows)("SegNet stage", "H200") and Old(rows)("SegNet stage", "A100")
    assert Old(rows[:1])("SegNet stage", "H200") and Old([rows[0] | {"code": "c"}, rows[1]])("SegNet stage", "H200")
    one = rows[0] | {"kernel": "k", "config": {}, "us": 1.0, "bound": "dram", "programs": 1, "assumed": False}
    assert "| 1.0* |" in page([one | {"terms": {"dram": 1.0}}], lambda case, chip: True)


def test_a_trip_of_another_name_is_an_error():
    """A loop's variable was renamed, and its trips were taken as 1: the case has to name it."""
    arguments = {"x": torch.empty(4, device="meta"), "y": torch.empty(4, device="meta"), "rows": 100}
    assert Kernel(TTIR).work(arguments, (4,), 0, {"m": 3}).assumed
    with pytest.raises(RuntimeError, match=r"the loop over m are not given, but those over \['i'"):
        Kernel(TTIR).work(arguments, (4,), 0, {"i": 3})


def test_the_page_says_first_that_nothing_is_measured(tmp_path):
    row = {"case": "SegNet stage", "chip": "H200", "kernel": "max_pool_fwd", "config": {"BLOCK_M": 64, "num_warps": 4},
           "us": 12.5, "bound": "dram", "programs": 7, "blocks": 2, "assumed": True,
           "terms": {"dram": 10.5, "issue": 5.0}}  # fmt: skip
    path = tmp_path / "rows.json"
    write(path, [row | {"us": 99.0}], "SegNet stage", "H200")
    rows = write(path, [row], "SegNet stage", "H200")
    assert rows == [row]
    text = page(rows)
    assert text.startswith(HEAD) and HEAD.split("\n\n")[1].startswith("Nothing on this page is measured")
    assert (
        "-10 to +30 %" in HEAD
        and "| SegNet stage | max_pool_fwd | M 64 warps 4 | 7 | ~12.5 | dram 84%, issue 40% |" in text
    )


def test_the_fastest_candidate_is_chosen_of_those_that_compile_and_do_not_spill(monkeypatch, tmp_path):
    from fastseg.kernels.runtime import config
    from fastseg.kernels.tools.predict import choose
    from fastseg.kernels.tools.predict.model import Prediction

    monkeypatch.setattr(config, "_heuristics", {"toy": lambda size, C: {"BLOCK": 64}})
    monkeypatch.setattr(config, "_candidates", {"toy": lambda size, C: [{"BLOCK": b} for b in (8, 16, 32, 128)]})
    cpu = torch.device("cpu")
    ask = lambda: [config.select("toy", size=size, device=cpu, C=3) for size in (100, 200, 100)]
    us = {64: 10.0, 8: 1.0, 16: 2.0, 32: 8.0, 128: 8.6}

    def predictions(fn, chip, wanted):
        assert wanted("_toy_kernel") and not wanted("_other_kernel")
        blocks = [cfg.BLOCK for cfg in fn()]
        if blocks[0] == 8:
            raise RuntimeError("does not compile")
        refused = {16: "spills"}
        return [Prediction("toy", {}, us[b] * 1e-6, "dram", {}, 1, 1, False, refused.get(b, "")) for b in blocks]

    found = list(choose.choose("toy", ask, H200, predictions))
    assert [(choice.row.size, choice.values, choice.clear) for choice in found] == [
        (100, {"BLOCK": 32}, True),
        (200, {"BLOCK": 32}, True),
    ]
    us[32] = 8.6  # 14 % less is no clear margin
    assert [choice.clear for choice in choose.choose("toy", ask, H200, predictions)] == [False, False]
    choose.write(found[0], H200, tmp_path)
    written = json.loads((tmp_path / "NVIDIA_H200.json").read_text())
    assert written["configs"] == {} and written["predicted"] == {"toy": {"C=3": {"100": {"BLOCK": 32}}}}


def test_shipped_predictions_answer_what_the_kernels_ask():
    from fastseg.kernels.batch_norm import stats  # noqa: F401, registers its heuristics
    from fastseg.kernels.runtime import config

    for path in config.SHIPPED.glob("*.json"):
        for kernel, rows in json.loads(path.read_text()).get(config.PREDICTED, {}).items():
            for row, sizes in rows.items():
                key = {name: int(value) for name, value in (part.split("=") for part in row.split(","))}
                for size, values in sizes.items():
                    assert values in config.candidates_of(kernel, int(size), **key)[1:], (kernel, row, size)
