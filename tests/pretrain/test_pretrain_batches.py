import numpy as np
import pytest
import torch

from hbert.data import MaskedBatches
from hbert.pretrain.batches import StepBatches
from hbert.pretrain.recipes import Recipe
from hbert.pretrain.schedule import BatchPlan

CPU = torch.device("cpu")
OPTIONS = {"batch_size": 7, "block_size": 32}


def batches(cache, rank=0, processes=1, **options):
    return StepBatches(cache, Recipe(**{**OPTIONS, **options}), 3, CPU, rank=rank, processes=processes)


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_processes_share_the_batch_of_one(cache, processes, accumulate):
    plan = BatchPlan(Recipe(**OPTIONS), 10)
    whole = MaskedBatches(cache, cache.train.blocks(32), 7, seed=3)
    for step in (0, 4, 9):
        shares = [batches(cache, rank, processes, accumulate=accumulate).of(step, plan) for rank in range(processes)]
        parts = [part for share in shares for part in share.parts]
        assert len(parts) == processes * accumulate
        expected = whole[step]
        assert torch.equal(torch.cat([p.inputs["input_ids"] for p in parts]), torch.from_numpy(expected.input_ids))
        assert torch.equal(torch.cat([p.labels for p in parts]), torch.from_numpy(expected.labels))
        masked = int((expected.labels != -100).sum())
        assert sum(part.masked for part in parts) == masked
        assert {int(share.num_masked) for share in shares} == {masked} and {share.blocks for share in shares} == {7}


def test_a_ramp_reads_the_stream_in_order(cache):
    recipe = Recipe(batch_size=5, block_size=32, ramp_start=2, ramp_fraction=0.5)
    plan = BatchPlan(recipe, 12)
    ramp = StepBatches(cache, recipe, 3, CPU)
    rows = []
    for step in range(12):
        (part,) = ramp.of(step, plan).parts
        rows += torch.where(part.labels == -100, part.inputs["input_ids"], part.labels).tolist()
    stream = MaskedBatches(cache, cache.train.blocks(32), 1, seed=3, rate=0.0)
    assert rows == [stream[position].input_ids[0].tolist() for position in range(len(rows))]


def test_masking_options_reach_the_batches(cache):
    (part,) = batches(cache, masking_rate=0.5, mask_replace=0.0, random_replace=0.0, batch_size=64).at(0, 0, 64).parts
    share = (part.labels != -100).double().mean().item()
    assert 0.4 < share < 0.55
    assert torch.equal(part.inputs["input_ids"][part.labels != -100], part.labels[part.labels != -100])


def test_document_borders(cache):
    (plain,) = batches(cache).at(0, 0, 7).parts
    (packed,) = batches(cache, document_borders=True).at(0, 0, 7).parts
    ids = plain.inputs["input_ids"]
    assert torch.equal(packed.inputs["input_ids"], ids.flatten())
    assert torch.equal(packed.labels, plain.labels.flatten())
    starts = [0]
    for row, line in enumerate(ids.tolist()):
        starts += [row * 32 + column for column, token in enumerate(line) if column == 0 or token == 2]
    assert packed.inputs["cu_seqlens"].tolist() == [*sorted(set(starts)), 7 * 32]
    assert packed.inputs["cu_seqlens"].dtype == torch.int32 and packed.inputs["max_seqlen"] == 32
    # The test is worth something only if a document ends inside a block.
    assert len(packed.inputs["cu_seqlens"]) > 8


def test_what_cannot_be_split(cache):
    with pytest.raises(ValueError, match="7 blocks cannot be split over 4 processes x 2 accumulation passes"):
        batches(cache, processes=4, accumulate=2)
    with pytest.raises(ValueError, match="shorter than one block"):
        batches(cache, block_size=10**9)


def test_stream_positions_and_steps_are_independent(cache):
    stream = MaskedBatches(cache, cache.train.blocks(32), 4, seed=3)
    assert np.array_equal(stream.at(5, 20, 4).labels, stream[5].labels)
    assert not np.array_equal(stream.at(6, 20, 4).labels, stream[5].labels)
    with pytest.raises(IndexError, match="step is -1"):
        stream.at(-1, 0, 4)
