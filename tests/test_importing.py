"""No garbage collections while modules are imported."""

import gc

import pytest

from prism_pl.importing import no_collections


@pytest.mark.parametrize("enabled", [True, False])
def test_collections_are_off_meanwhile_and_then_as_before(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with no_collections():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
