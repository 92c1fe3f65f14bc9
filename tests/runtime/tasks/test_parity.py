"""Entities, answers and labels equal transformers' pipelines on 200 real inputs each, for every architecture that we write graphs for."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.parity_pipelines import ARCHITECTURES, material, measure_architecture

# Of the pipelines themselves: advice on batching, and that tokenizers without word pieces guess where words end.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_every_item_equals_the_pipelines(architecture: str, tmp_path: Path) -> None:
    rows = await measure_architecture(architecture, material(200), tmp_path, few=20)
    assert len(rows) == 15
    different = [f"{row.name}: {row.equal} of {row.total}; {row.first_difference}" for row in rows if row.equal < row.total]
    assert not different, "\n".join(different)
