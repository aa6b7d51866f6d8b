"""Names of topologies, and what they need."""

import pytest

from jaxmed.errors import UserError
from jaxmed.plan import topology as topologies
from jaxmed.plan.chips import CHIPS
from jaxmed.plan.topology import check_compiler, environment, parse_topology, siblings


@pytest.mark.parametrize(
    ("name", "count", "domain"),
    [
        ("v5p:2x2x4", 16, 16),
        ("v5e:4x8", 32, 32),
        ("tpu7x:2x2x1", 8, 8),
        ("2xv5p:2x2x4", 32, 16),
        ("3xv6e:2x2", 12, 4),
        ("h100:2x8", 16, 8),
        ("h200:1x8", 8, 8),
        ("cpu:8", 8, 8),
    ],
)
def test_names(name, count, domain):
    found = parse_topology(name)
    assert (found.name, found.count, found.domain) == (name, count, domain)


@pytest.mark.parametrize(
    "name", ["v9z:2x2", "v5p", "v5p:", "v5p:2x2", "h100:8", "cpu:2x2", "v5e:0x4", "h100:2xx8", "0xv5e:2x2", "2xh100:2x8"]
)
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(UserError, match=r"4x8|2x2x4|1x8|1, 2, 4"):
        parse_topology(name)


def test_sizes_of_a_family_ascend():
    counts = [t.count for t in siblings(parse_topology("v5e:4x8"))]
    assert counts == sorted(counts) and counts[0] == 1 and 256 in counts


def test_a_child_gets_what_its_devices_need(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3 --other=1")
    flags = environment(parse_topology("cpu:6"))["XLA_FLAGS"].split()
    assert sorted(flags) == ["--other=1", "--xla_force_host_platform_device_count=6"]
    assert environment(parse_topology("v5e:2x2"))["TPU_SKIP_MDS_QUERY"] == "1"


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"jaxmed\[plan-gpu\]"):
        check_compiler(parse_topology("h100:1x8"))
    with pytest.raises(UserError, match=r"libtpu.*jaxmed\[plan\]"):
        check_compiler(parse_topology("v6e:4x4"))
    check_compiler(parse_topology("cpu:4"))


def test_every_family_has_sizes():
    assert set(CHIPS) == set(topologies.EXAMPLES)
