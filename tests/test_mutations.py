"""The defects that `scripts/mutate` puts into the pool still fit into it, and their tests still exist."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_each_defect_fits_into_the_code_and_has_its_test() -> None:
    """`scripts/mutate` itself takes minutes, and would be noticed to fail only when it is run."""
    mutations = runpy.run_path(str(ROOT / "scripts" / "mutate"))["MUTATIONS"]
    assert len(mutations) >= 36
    for mutation in mutations:
        code = (ROOT / "worker" / "inworld" / "pool" / mutation.file).read_text()
        assert mutation.applied_to(code) != code
        file, _, name = mutation.test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), mutation.test
