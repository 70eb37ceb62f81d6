"""The arithmetic of the preflight, on programs written down here and one compiled here."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.preflight import microbatches, topologies, verdict
from rlhf_jax.preflight.hlo import Collective, Module, byte_size
from rlhf_jax.preflight.microbatches import Trial
from rlhf_jax.preflight.programs import Measured, Program, measure
from rlhf_jax.preflight.run_shapes import whole_row_counts
from rlhf_jax.preflight.topologies import CHIPS, Topology, parse_topology
from rlhf_jax.runtime.sharding import make_mesh
from rlhf_jax.training.memory import Holding

# Two loops, one in the other; every way of writing groups; a fusion with a product.
HLO = """HloModule example, num_partitions=8

%product (a: bf16[4,16], b: bf16[16,32]) -> f32[4,32] {
  %a = bf16[4,16]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %y = f32[] parameter(1)
}

%inner (p: (bf16[4,16], bf16[16,32])) -> (bf16[4,16], bf16[16,32]) {
  %p = (bf16[4,16]{1,0}, bf16[16,32]{1,0}) parameter(0)
  %x = bf16[4,16]{1,0} get-tuple-element(%p), index=0
  %w = bf16[16,32]{1,0} get-tuple-element(%p), index=1
  %f = f32[4,32]{1,0} fusion(%x, %w), kind=kCustom, calls=%product, metadata={op_name="layer"}
  %g = (bf16[4,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], \
dimensions={0}, metadata={op_name="gather/weights"}
  %gd = bf16[32,16]{1,0} all-gather-done(%g)
  ROOT %t = (bf16[4,16]{1,0}, bf16[16,32]{1,0}) tuple(%x, %w)
}

%always (p: (bf16[4,16], bf16[16,32])) -> pred[] {
  ROOT %c = pred[] constant(true)
}

%outer (q: (bf16[4,16], bf16[16,32])) -> (bf16[4,16], bf16[16,32]) {
  %q = (bf16[4,16]{1,0}, bf16[16,32]{1,0}) parameter(0)
  ROOT %loop = (bf16[4,16]{1,0}, bf16[16,32]{1,0}) while(%q), condition=%always, body=%inner, \
backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (x: bf16[4,16], w: bf16[16,32]) -> f32[16] {
  %x = bf16[4,16]{1,0} parameter(0)
  %w = bf16[16,32]{1,0} parameter(1)
  %t = (bf16[4,16]{1,0}, bf16[16,32]{1,0}) tuple(%x, %w)
  %until = (bf16[4,16]{1,0}, bf16[16,32]{1,0}) while(%t), condition=%always, body=%outer
  %big = f32[16]{0} constant(0)
  %r = f32[16]{0} all-reduce(%big), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, \
to_apply=%add
  %s = f32[2]{0} reduce-scatter(%r), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %q = bf16[2,8,4,16]{3,2,1,0} constant(0)
  %k = bf16[2,8,4,16]{3,2,1,0} constant(0)
  %fwd = (bf16[2,8,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax"
  %bwd = (bf16[2,8,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k, %fwd), \
custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %out = f32[16]{0} copy(%r)
}
"""


def test_collectives_with_their_loops():
    """Sizes are those of the whole array, counts those of one call."""
    found = {c.kind: c for c in Module(HLO, devices=8, unknown_trips=5).collectives()}
    gather = found["all-gather"]
    assert gather.size == 8 * 4 * 16 * 2  # eight parts of 4 x 16 bfloat16
    assert (gather.group, gather.loops, gather.times) == (8, (5, 3), 15)
    assert (gather.dtype, gather.source) == ("bf16", "gather/weights")
    assert gather.sent == 15 * 1024 * 7 / 8
    reduce = found["all-reduce"]
    assert (reduce.size, reduce.group, reduce.loops, reduce.times) == (64, 4, (), 1)
    assert reduce.sent == 2 * 64 * 3 / 4
    assert (found["reduce-scatter"].size, found["reduce-scatter"].group) == (64, 8)


def test_flops_with_their_loops():
    """15 products of 4 x 16 x 32; attention of 2 x 8 x 4 heads of 16 against 8 keys."""
    products = 15 * 2 * 4 * 16 * 32
    one = 2 * (2 * 8 * 4 * 16) * 8
    assert Module(HLO, devices=8, unknown_trips=5).flops() == products + 2 * one + 5 * one


def test_loops_that_are_not_counted_are_named():
    """The inner loop states its trip count, the outer one does not."""
    assert Module(HLO, devices=8).unknown_loops == {"until"}


def test_kernels_of_libraries():
    """What tells flash attention from plain attention."""
    kernels = Module(HLO, devices=8).kernels()
    assert kernels == {"__cudnn$fmhaSoftmax": 1, "__cudnn$fmhaSoftmaxBackward": 1}


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[]", 4), ("(bf16[3,5]{1,0}, pred[7]{0})", 37), ("u8[0]{0}", 0), ("token[]", 0)],
)
def test_byte_size(shape, size):
    assert byte_size(shape) == size


def test_a_compiled_scan_counts_as_its_layers():
    """Five products of 6 x 8 x 8 in a real module; split over eight devices, a gather each."""
    mesh = make_mesh(8)

    @jax.jit
    def layers(x, weights):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0]

    x = jax.ShapeDtypeStruct((48, 8), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    spread = NamedSharding(mesh, P(None, None, "data"))
    w = jax.ShapeDtypeStruct((5, 8, 8), jnp.float32, sharding=spread)
    result = measure(Program("layers", layers, (x, w)), Topology("host:8", CHIPS["host"], 1, 8))
    assert result.flops == 5 * 2 * 6 * 8 * 8
    gathers = [c for c in result.collectives if c.kind == "all-gather"]
    assert [(c.size, c.group, c.loops) for c in gathers] == [(8 * 8 * 4, 8, (5,))]
    assert result.held == 6 * 8 * 4 + 5 * 8 * 4
    assert result.peak > result.held


def test_parse_topology():
    assert parse_topology("a100-80g:8").size == 8
    several = parse_topology("h100-80g:64x8")
    assert (several.nodes, several.per_node, several.size) == (64, 8, 512)
    assert parse_topology("v5p:2x2x4").size == 16


@pytest.mark.parametrize(
    "text", ["a100", "a100-80g:", "b200:8", "v5p:8", "a100-80g:0", "host:2x2x2"]
)
def test_wrong_topologies_are_refused(text):
    with pytest.raises(ValueError, match=f"topology '{text}': use one of a100-80g"):
        parse_topology(text)


@pytest.mark.parametrize(
    ("name", "extra"), [("a100-80g:8", "preflight"), ("v5p:2x2x1", "preflight-tpu")]
)
def test_missing_wheels_name_the_pip_command(monkeypatch, name, extra):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ImportError) as error:
        topologies.make_devices(parse_topology(name))
    assert str(error.value).endswith(f'pip install "rlhf_jax[{extra}]"')
    assert "\n" not in str(error.value)


def test_targets_say_what_xla_needs_to_know():
    """The fields without which the GPU compiler gives up."""
    for name, capability in (("a100-80g", 8), ("h100-80g", 9)):
        target = CHIPS[name].target
        for field in ("platform_name", "dnn_version_info", "runtime_version", "core_count"):
            assert field in target
        assert f"cuda_compute_capability {{ major: {capability} }}" in target
        assert f"device_memory_size: {CHIPS[name].memory}" in target


CHIP = dataclasses.replace(
    CHIPS["host"], memory=100 * 2**30, flops=10.0, bandwidth=100.0, link=10.0, network=1.0
)


def program(name: str = "step", **changes) -> Measured:
    """A program with 50 GiB that are resident and 10 GiB of its own."""
    settings = {"calls": 2, "held": 50 * 2**30, "peak": 60 * 2**30, "flops": 30.0}
    settings |= {"traffic": 200.0, "collectives": (), "compile_seconds": 1.0}
    return Measured(name=name, **(settings | changes))


def collective(kind: str = "all-gather", size: int = 80, group: int = 8, times: int = 1):
    """One that runs once."""
    return Collective(kind, size, group, times, (), "bf16", "")


def test_the_largest_bound_counts():
    """30 operations at 10 a second; 200 bytes at 100; 70 sent at 10."""
    one_node = Topology("t", CHIP, 1, 8)
    bounds = program(collectives=(collective(),)).bounds(one_node)
    assert bounds == {"compute": 3.0, "memory": 2.0, "links": 7.0}
    assert program(collectives=(collective(),)).seconds(one_node) == 7.0
    assert program().seconds(one_node) == 3.0


def test_adapters_bound_groups_of_several_nodes():
    """Four nodes of two: half of 80 bytes would cross between two nodes, three quarters do here.

    A node needs 60 bytes from the others, through two adapters of 1 byte a second: 30 s.
    """
    nodes = Topology("t", CHIP, 4, 2)
    links = program(collectives=(collective(),)).bounds(nodes)["links"]
    assert links == pytest.approx(30.0)
    inside = program(collectives=(collective(group=2),)).bounds(nodes)["links"]
    assert inside == pytest.approx(80 / 2 / 10)


def make_verdict(*programs: Measured, mode: str = "zero2", held: int = 60) -> verdict.Verdict:
    """So many GiB are resident."""
    holding = Holding("policy/parameters", 0, held * 2**30, (), "")
    return verdict.Verdict(Topology("t", CHIP, 1, 8), mode, (holding,), programs, samples=12)


def test_the_program_with_the_highest_peak_decides():
    result = make_verdict(program("small", peak=51 * 2**30), program("large"))
    assert result.deciding.name == "large"
    assert result.peak(result.deciding) == 70 * 2**30  # 60 resident and 10 of its own
    assert result.missing == -28 * 2**30  # of 98: two are for what XLA does not plan
    assert result.fraction == 0.7
    assert result.seconds == 2 * 3.0 + 2 * 3.0
    assert "fits: peak 70.00 GiB a device in large, 28.00 GiB free" in verdict.summary(result)


def test_where_loops_are_not_counted_only_the_memory_is_reported():
    """Rather than the work of one layer as that of all."""
    counted = make_verdict(program())
    assert counted.to_json()["samples_per_second_at_most"] == 12 / (2 * 3)
    assert "samples/s" in verdict.text(counted)
    result = make_verdict(program(), program("score", counted=False))
    numbers = result.to_json()
    assert not numbers["counted"] and "samples_per_second_at_most" not in numbers
    assert "flops" in numbers["programs"][0] and "flops" not in numbers["programs"][1]
    text = verdict.text(result)
    assert "memory only: the compiler for host does not tell" in text
    assert "samples/s" not in text and "fits: peak 70.00 GiB a device" in text


def test_what_does_not_fit_says_by_how_much():
    result = make_verdict(program(), held=95)
    assert result.missing == 7 * 2**30
    line = verdict.summary(result)
    assert line.startswith("DOES NOT FIT: peak 105.00 GiB a device in step, 7.00 GiB more than")
    assert result.to_json()["missing_bytes"] == 7 * 2**30


@pytest.mark.parametrize(
    ("mode", "kinds", "ratio"),
    [
        ("zero2", ("reduce-scatter", "all-gather"), 1.0),
        ("zero0", ("all-reduce",), 1.0),
        ("zero2", ("all-reduce", "all-gather"), 1.5),
        ("zero3", ("all-gather", "all-gather", "reduce-scatter"), 1.0),
    ],
)
def test_traffic_against_theory(mode, kinds, ratio):
    """An all-reduce is worth two; what metrics send is negligible."""
    weights = 2**30
    exchanged = tuple(collective(kind, size=weights) for kind in kinds)
    one = program(collectives=(*exchanged, collective("all-reduce", 64)), weights=weights)
    result = make_verdict(one, mode=mode)
    assert result.traffic(one)["ratio"] == pytest.approx(ratio)
    assert bool(result.gradient_all_reduces()) == ("all-reduce" in kinds)


def trial(count: int, need: int) -> Trial:
    """64 rows in so many microbatches, and the memory that these need more than there is."""
    return Trial(count, 64 // count, 10 + need, need, "train step")


def searched(current: int, counts: tuple[int, ...], least: int) -> list[int]:
    """The numbers that are tried where `least` microbatches and more of them fit."""
    tried = microbatches.search(
        trial(current, least - current), counts, lambda count: trial(count, least - count)
    )
    return [one.count for one in tried]


def test_the_search_goes_to_the_edge_and_no_further():
    """From what fits to the first that does not, and from what does not to the first that does."""
    counts = (1, 2, 4, 8, 16)
    assert searched(16, counts, least=4) == [16, 8, 4, 2]
    assert searched(1, counts, least=4) == [1, 2, 4]
    assert searched(4, counts, least=1) == [4, 2, 1]
    assert searched(4, counts, least=99) == [4, 8, 16]
    assert searched(1, counts, least=1) == [1]


def test_the_search_takes_divisors_where_rows_do_not_halve():
    """21 rows for each device: 7, then 3, then 1."""
    counts = whole_row_counts(168, 8)
    assert counts == (1, 3, 7, 21)
    assert searched(7, counts, least=1) == [7, 3, 1]
    assert searched(3, counts, least=5) == [3, 7]
    # A number that divides nothing, whose batch is filled up.
    assert searched(5, counts, least=2) == [5, 1]


def test_the_largest_of_those_that_fit():
    tried = [trial(8, -4), trial(4, 0), trial(2, 1)]
    assert microbatches.largest(tried).rows == 16
    assert microbatches.largest([trial(2, 1)]) is None


def test_only_programs_in_microbatches_are_tried():
    """The one with the highest peak is another: its rows would stay the same."""
    result = make_verdict(program("large"), program("step", peak=55 * 2**30, divided=True))
    assert result.deciding.name == "large"
    found = result.trial(4, 16)
    assert (found.count, found.rows, found.program) == (4, 16, "step")
    assert found.peak == 65 * 2**30 and found.missing == found.peak - result.room and found.fits


def test_the_report_says_what_was_tried():
    """In the words of the stage, as text and as JSON."""
    trials = (trial(4, -(2**20)), trial(2, 2**20))
    result = dataclasses.replace(
        make_verdict(program()), counted_in=("pairs", "update"), notes=("as wide as a side",)
    )
    assert "microbatches that were tried" not in verdict.text(result)
    result = dataclasses.replace(result, trials=trials)
    text = verdict.text(result)
    assert "an update of 12 pairs takes at least" in text and "2 an update" in text
    assert "  as wide as a side\n" in text
    assert "  4 of 16 pairs" in text and ": fits, 1.0 MiB free\n" in text
    assert "  2 of 32 pairs" in text and ": does not fit, 1.0 MiB are missing\n" in text
    assert "the largest microbatch that fits: 16 pairs, config.train.microbatches=4\n" in text
    numbers = result.to_json()["microbatches"]
    assert [one["fits"] for one in numbers["tried"]] == [True, False]
    assert numbers["largest"] == {"count": 4, "rows": 16}
    none = dataclasses.replace(result, trials=trials[1:])
    assert "the largest microbatch that fits: none of these" in verdict.text(none)
    assert none.to_json()["microbatches"]["largest"] is None


def test_what_is_beside_a_program_counts():
    """A merged model, say, that is neither its argument nor there between programs."""
    double = jax.jit(lambda x: 2 * x)
    one = Program("double", double, (jax.ShapeDtypeStruct((8,), jnp.float32),))
    topology = Topology("host:1", CHIPS["host"], 1, 1)
    alone = measure(one, topology)
    beside = measure(dataclasses.replace(one, beside=1000), topology)
    assert beside.extra == alone.extra + 1000 and beside.held == alone.held
