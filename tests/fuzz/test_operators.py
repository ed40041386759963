"""Every operator of the registry on every backend at hand: values, special values, and the same bits whatever the circumstances."""

import pytest
from hypothesis import given

from fuzz import harness, oracle
from fuzz.cases import arguments, cases
from lifeops import registry

OPS = [name for name in registry.ops if harness.BACKEND in registry.ops[name].impls]


def test_every_operator_has_an_oracle():
    assert set(oracle.ORACLES) == set(registry.ops)


def _values(case):
    args = arguments(case)
    if harness.near_kink(case, args):
        case = case._replace(values="lattice")
        args = arguments(case)
    harness.check(case, args)


@pytest.mark.parametrize("name", OPS)
def test_values(name):
    @given(cases(name, harness.BACKEND))
    def property_(case):
        if not harness.out_of_time(name):
            _values(case)

    property_()
