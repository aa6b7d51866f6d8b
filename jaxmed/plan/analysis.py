"""One configuration on one topology, without compiling it: memory, FLOPs, bytes sent, roofline."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import jax

from jaxmed.config import Experiment
from jaxmed.plan import counts, programs
from jaxmed.plan.jaxprs import equations, is_kernel
from jaxmed.plan.memory import Memory, estimate
from jaxmed.plan.meshes import shape_of
from jaxmed.plan.policy import policy_flops
from jaxmed.plan.roofline import Roofline, roofline
from jaxmed.plan.sent import Collective, stated
from jaxmed.plan.topology import Topology
from jaxmed.sharding import AXES


@dataclass(frozen=True)
class Analysis:
    memory: Memory
    flops: float
    """Of all devices: the program's, recomputation included"""
    model_flops: float
    """Of all devices: what the mathematics needs"""
    policy_flops: float
    """Of all devices: what the mathematics needs with what the remat policy computes again; 0 for generation"""
    products: float
    """Of all devices: the program's without its kernels"""
    kernels: list[str]
    """Kernels whose FLOPs are a formula's"""
    traffic: float
    """Bytes one device reads and writes"""
    sent: list[Collective]
    """As the program states them"""
    least: dict[str, float]
    """Bytes one device must send, by mesh axis"""
    frozen_twice: float
    """Bytes one device receives if every split frozen weight comes forward and backward: 2 (n - 1) / n of them, a microbatch"""
    roofline: Roofline
    units: int
    """Of one step, what its speed counts: tokens (rows x length in training and prefill, rows in decoding), or pairs"""
    counted_loops: bool
    """False: the program has a loop of unknown length, counted once"""

    def mfu(self, topology: Topology) -> float:
        """Expected."""
        return self.model_flops / (self.roofline.expected * topology.chip.flops * topology.count)


def analyse(experiment: Experiment, topology: Topology, step: programs.Step, length: int) -> Analysis:
    """The experiment's mesh must be one of the topology (see meshes.check_mesh)."""
    sizes = dict(zip(AXES, shape_of(experiment.mesh, topology.count), strict=True))
    mesh = programs.abstract_mesh(tuple(sizes.values()), topology.chip.platform)
    with jax.sharding.use_abstract_mesh(mesh):
        program = programs.trace(experiment, mesh, step, length, topology.chip.platform)
        trained, frozen = programs.parameter_counts(experiment, mesh)
    jaxpr = program.traced.jaxpr.jaxpr
    flops = products = traffic = host = 0.0
    kernels: set[str] = set()
    known = True
    for equation in equations(jaxpr):
        flops += equation.flops * equation.times
        traffic += equation.traffic(topology.chip.on_chip) * equation.times
        host += equation.host_traffic * equation.times
        known &= equation.name != "while"
        if is_kernel(equation.eqn):
            kernels.add(equation.name)
        else:
            products += equation.flops * equation.times
    sent = stated(jaxpr, sizes, counts.gathered_shapes(trained | frozen), topology.chip.platform != "cpu")
    by_axes: Counter[tuple[str, ...]] = Counter()
    for c in sent:
        by_axes[c.axes] += c.total
    return Analysis(
        memory=estimate(program, experiment, topology.chip.platform),
        flops=flops * topology.count,
        model_flops=counts.model_flops(experiment, step, length, trained, frozen),
        policy_flops=policy_flops(experiment, length, trained, frozen, sorted(kernels)) if step == "train" else 0.0,
        products=products * topology.count,
        kernels=sorted(kernels),
        traffic=traffic,
        sent=sent,
        least=counts.least_sent(experiment, step, length, trained, frozen),
        frozen_twice=counts.frozen_twice(experiment, step, frozen),
        roofline=roofline(topology, flops, traffic, host, by_axes, sizes),
        units=experiment.data.batch * (1 if step == "decode" or experiment.task == "contrastive" else length),
        counted_loops=known,
    )


def by_axis(sent: list[Collective]) -> dict[str, float]:
    """Bytes by mesh axis; what runs over several axes together is named by all of them."""
    sums: dict[str, float] = defaultdict(float)
    for c in sent:
        sums["+".join(c.axes)] += c.total
    return dict(sums)


def first_length(experiment: Experiment, step: str) -> int:
    """The shortest bucket, which is what most rows have; generation: the longest. Texts of pairs are all of one length."""
    if experiment.task == "contrastive":
        return experiment.data.max_length
    return experiment.data.buckets[0] if step == "train" else experiment.data.buckets[-1]
